// The entry point of the CPU kernels.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/runtime/parallel.h"
#include "params.h"

namespace sparse_attn::cpu {

// Whether a result of so many bytes is larger than what a core's second-level cache usually keeps.
inline bool is_streamed(int64_t out_bytes) { return out_bytes >= int64_t{2} << 20; }

// Computes out and lse of one call with kernels of at most the given instruction set.
// Throws std::invalid_argument when the layout is not well formed, before any key is read.
void forward(const ForwardParams& params, Isa isa, const Parallel& parallel);

}  // namespace sparse_attn::cpu
