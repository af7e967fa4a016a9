// The kernels on AMX.
#pragma once

#include "kernels.h"

namespace sparse_attn::cpu {

extern const TileKernel kAmxTileFloat32, kAmxTileBFloat16, kAmxTileFloat16;
extern const BackwardKernel kAmxBackward;  // bfloat16
extern const HipKernel kAmxHipOfRows;      // bfloat16

}  // namespace sparse_attn::cpu
