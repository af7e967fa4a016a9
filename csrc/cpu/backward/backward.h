// The entry point of the gradients on CPU.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/runtime/parallel.h"
#include "params.h"

namespace sparse_attn::cpu {

// Computes the gradients of one call with kernels of at most the given instruction set; they are
// bitwise the same for any number of threads.
// Throws std::invalid_argument when the layout is not well formed, before any key is read.
void backward(const BackwardParams& params, Isa isa, const Parallel& parallel);

}  // namespace sparse_attn::cpu
