// A row of zeros in any dtype, for rows that are not there.
#pragma once

#include <cstddef>

#include "params.h"

namespace sparse_attn::cpu {

alignas(64) inline constexpr std::byte kZeroRow[kMaxHeadDim * sizeof(float)] = {};

}  // namespace sparse_attn::cpu
