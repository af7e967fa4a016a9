#include "kernels.h"
#include "key_cursor.h"
#include "standard_headers.h"

#define SPARSE_ATTN_ISA generic
#define SPARSE_ATTN_VECTOR_BYTES 16
#include "backward_fma.h"
#include "decode_kernel.h"
#include "fma_kernel.h"
#include "hip_kernel.h"
#include "row_gradients_kernel.h"

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
