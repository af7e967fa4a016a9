#if defined(__x86_64__)
#include "kernels.h"
#include "key_cursor.h"
#include "standard_headers.h"

#pragma GCC target("avx2,fma,f16c")

#define SPARSE_ATTN_ISA avx2
#define SPARSE_ATTN_VECTOR_BYTES 32
#include "backward_fma.h"
#include "decode_kernel.h"
#include "fma_kernel.h"
#include "hip_kernel.h"
#include "hip_rows_kernel.h"
#include "row_gradients_kernel.h"

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
