#if defined(__x86_64__)
#include "cpu/isa/kernels.h"
#include "cpu/kernels/amx_kernels.h"

namespace sparse_attn::cpu {

extern constinit const Kernels kAmxKernels = {
    .tile = {.bfloat16 = &kAmxTileBFloat16, .float16 = &kAmxTileFloat16},
    .tile_splitting_float32 = &kAmxTileFloat32,
    .backward = {.bfloat16 = &kAmxBackward},
    .hip_of_rows = {.bfloat16 = &kAmxHipOfRows},
};

}  // namespace sparse_attn::cpu
#endif
