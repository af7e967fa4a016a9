#if defined(__x86_64__)
#include "cpu/isa/kernels.h"
#include "cpu/kernels/key_cursor.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/standard_headers.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")

#define SPARSE_ATTN_ISA avx512
#define SPARSE_ATTN_VECTOR_BYTES 64
#include "cpu/kernels/backward_fma.h"
#include "cpu/kernels/decode_fma.h"
#include "cpu/kernels/hip_fma.h"
#include "cpu/kernels/hip_rows_fma.h"
#include "cpu/kernels/row_gradients_fma.h"
#include "cpu/kernels/tile_fma.h"

namespace sparse_attn::cpu {

extern constinit const Kernels kAvx512Kernels = {
    .tile = avx512::kFmaTiles,
    .decode = avx512::kFmaDecodes,
    .backward = avx512::kFmaBackwards,
    .row_gradients = avx512::kFmaRowGradients,
    .hip = avx512::kFmaHips,
    .hip_of_rows = avx512::kFmaHipsOfRows,
    .mean = avx512::kMeans,
};

}  // namespace sparse_attn::cpu
#endif
