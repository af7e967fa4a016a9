// The instruction sets that kernels are compiled for, and which of them this machine can run.
#pragma once

namespace sparse_attn::cpu {

enum class Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

inline constexpr int kNumIsas = 5;

const char* isa_name(Isa isa);
bool is_supported(Isa isa);
Isa best_isa();

}  // namespace sparse_attn::cpu
