// The instruction sets that kernels are compiled for, and which of them this machine can run.
#pragma once

#include <iterator>

namespace sparse_attn::cpu {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };

inline constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};
inline constexpr int kNumIsas = static_cast<int>(std::size(kIsaNames));

inline const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }
bool is_supported(Isa isa);
Isa best_isa();

}  // namespace sparse_attn::cpu
