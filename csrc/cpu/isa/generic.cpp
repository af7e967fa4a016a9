#include "cpu/isa/kernels.h"
#include "cpu/kernels/key_cursor.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/standard_headers.h"

#define SPARSE_ATTN_ISA generic
#define SPARSE_ATTN_VECTOR_BYTES 16
#include "cpu/kernels/backward_fma.h"
#include "cpu/kernels/decode_fma.h"
#include "cpu/kernels/hip_fma.h"
#include "cpu/kernels/row_gradients_fma.h"
#include "cpu/kernels/tile_fma.h"

namespace sparse_attn::cpu {

extern constinit const Kernels kGenericKernels = {
    .tile = generic::kFmaTiles,
    .decode = generic::kFmaDecodes,
    .backward = generic::kFmaBackwards,
    .row_gradients = generic::kFmaRowGradients,
    .hip = generic::kFmaHips,
    .hip_of_rows = generic::kFmaHips,
    .mean = generic::kMeans,
};

}  // namespace sparse_attn::cpu
