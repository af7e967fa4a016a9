#if defined(__x86_64__)
#include "kernels.h"
#include "key_cursor.h"
#include "standard_headers.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")

#define SPARSE_ATTN_ISA avx512
#define SPARSE_ATTN_VECTOR_BYTES 64
#include "backward_fma.h"
#include "decode_kernel.h"
#include "fma_kernel.h"
#include "hip_kernel.h"
#include "hip_rows_kernel.h"
#include "row_gradients_kernel.h"

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
