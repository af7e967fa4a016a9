#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "backward_kernel.h"
#include "decode.h"
#include "hip.h"
#include "kernel.h"
#include "key_cursor.h"
#include "row_gradients.h"

#pragma GCC target("avx2,fma,f16c")

#define SPARSE_ATTN_ISA avx2
#define SPARSE_ATTN_VECTOR_BYTES 32
#include "decode_kernel.h"
#include "fma_kernel.h"
#include "hip_rows_kernel.h"

// The gradients use parts of the forward kernel.
#include "backward_fma.h"
#include "row_gradients_kernel.h"

namespace sparse_attn::cpu {

const TileKernel& avx2_kernel(DType dtype) { return avx2::fma_kernel(dtype); }
const DecodeKernel& avx2_decode_kernel(DType dtype) { return avx2::decode_kernel(dtype); }
const HipKernel& avx2_hip_kernel(DType dtype) { return avx2::hip_kernel(dtype); }
const HipKernel& avx2_hip_rows_kernel(DType dtype) { return avx2::hip_rows_kernel(dtype); }

const BackwardKernel& avx2_backward_kernel(DType dtype) { return avx2::fma_backward_kernel(dtype); }

const RowGradientKernel& avx2_row_gradients(DType dtype) {
  return avx2::row_gradient_kernel(dtype);
}

}  // namespace sparse_attn::cpu
#endif
