// All kernels of one instruction set, and the choice among the sets.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/kernels/backward_kernel.h"
#include "cpu/kernels/by_dtype.h"
#include "cpu/kernels/decode_kernel.h"
#include "cpu/kernels/hip_kernel.h"
#include "cpu/kernels/row_gradients_kernel.h"
#include "cpu/kernels/tile_kernel.h"

namespace sparse_attn::cpu {

// What an instruction set leaves out, the next lower one that has it does.
struct Kernels {
  ByDType<TileKernel> tile = {};
  const TileKernel* tile_splitting_float32 = nullptr;  // multiplies two bfloat16 for each float32
  ByDType<DecodeKernel> decode = {};
  ByDType<BackwardKernel> backward = {};
  ByDType<RowGradientKernel> row_gradients = {};
  ByDType<HipKernel> hip = {};
  ByDType<HipKernel> hip_of_rows = {};  // for more than kFewHipRows rows: takes as long for fewer
  ByDType<MeanKernel> mean = {};
};

inline constexpr int64_t kFewHipRows = 4;

// Null if this library has none for the instruction set.
const Kernels* kernels_of(Isa isa);

// The kernel of the given kind of the highest instruction set up to `isa` that has one.
template <class Kernel>
const Kernel& find_kernel(Isa isa, ByDType<Kernel> Kernels::* kind, DType dtype) {
  for (int level = static_cast<int>(isa);; --level) {
    const Kernels* kernels = kernels_of(static_cast<Isa>(level));
    if (kernels == nullptr) continue;
    if (const Kernel* kernel = (kernels->*kind)[dtype]) return *kernel;
  }
}

// The same for a kind that no instruction set needs to have: null if none has it.
template <class Kernel>
const Kernel* find_kernel(Isa isa, const Kernel* Kernels::* kind) {
  for (int level = static_cast<int>(isa); level >= 0; --level) {
    const Kernels* kernels = kernels_of(static_cast<Isa>(level));
    if (kernels != nullptr && kernels->*kind != nullptr) return kernels->*kind;
  }
  return nullptr;
}

inline const HipKernel& find_hip_kernel(Isa isa, DType dtype, int64_t num_rows) {
  return find_kernel(isa, num_rows > kFewHipRows ? &Kernels::hip_of_rows : &Kernels::hip, dtype);
}

}  // namespace sparse_attn::cpu
