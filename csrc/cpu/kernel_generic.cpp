#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "backward_kernel.h"
#include "decode.h"
#include "hip.h"
#include "kernel.h"
#include "key_cursor.h"
#include "row_gradients.h"

#define SPARSE_ATTN_ISA generic
#define SPARSE_ATTN_VECTOR_BYTES 16
#include "decode_kernel.h"
#include "fma_kernel.h"
#include "hip_kernel.h"

// The gradients use parts of the forward kernel.
#include "backward_fma.h"
#include "row_gradients_kernel.h"

namespace sparse_attn::cpu {

const TileKernel& generic_kernel(DType dtype) { return generic::fma_kernel(dtype); }
const DecodeKernel& generic_decode_kernel(DType dtype) { return generic::decode_kernel(dtype); }
const HipKernel& generic_hip_kernel(DType dtype) { return generic::hip_kernel(dtype); }

const BackwardKernel& generic_backward_kernel(DType dtype) {
  return generic::fma_backward_kernel(dtype);
}

const RowGradientKernel& generic_row_gradients(DType dtype) {
  return generic::row_gradient_kernel(dtype);
}

}  // namespace sparse_attn::cpu
