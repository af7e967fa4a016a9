// The kernels on AMX.
#pragma once

#include "cpu/kernels/backward_kernel.h"
#include "cpu/kernels/hip_kernel.h"
#include "cpu/kernels/tile_kernel.h"

namespace sparse_attn::cpu {

extern const TileKernel kAmxTileFloat32, kAmxTileBFloat16, kAmxTileFloat16;
extern const BackwardKernel kAmxBackward;  // bfloat16
extern const HipKernel kAmxHipOfRows;      // bfloat16

}  // namespace sparse_attn::cpu
