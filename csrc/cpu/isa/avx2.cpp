#if defined(__x86_64__)
#include "cpu/isa/kernels.h"
#include "cpu/kernels/key_cursor.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/standard_headers.h"

#pragma GCC target("avx2,fma,f16c")

#define SPARSE_ATTN_ISA avx2
#define SPARSE_ATTN_VECTOR_BYTES 32
#include "cpu/kernels/backward_fma.h"
#include "cpu/kernels/decode_fma.h"
#include "cpu/kernels/hip_fma.h"
#include "cpu/kernels/hip_rows_fma.h"
#include "cpu/kernels/row_gradients_fma.h"
#include "cpu/kernels/tile_fma.h"

namespace sparse_attn::cpu {

extern constinit const Kernels kAvx2Kernels = {
    .tile = avx2::kFmaTiles,
    .decode = avx2::kFmaDecodes,
    .backward = avx2::kFmaBackwards,
    .row_gradients = avx2::kFmaRowGradients,
    .hip = avx2::kFmaHips,
    .hip_of_rows = avx2::kFmaHipsOfRows,
    .mean = avx2::kMeans,
};

}  // namespace sparse_attn::cpu
#endif
