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

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")

#define SPARSE_ATTN_ISA avx512
#define SPARSE_ATTN_VECTOR_BYTES 64
#include "decode_kernel.h"
#include "fma_kernel.h"
#include "hip_rows_kernel.h"

// The gradients use parts of the forward kernel.
#include "backward_fma.h"
#include "row_gradients_kernel.h"

namespace sparse_attn::cpu {

const TileKernel& avx512_kernel(DType dtype) { return avx512::fma_kernel(dtype); }
const DecodeKernel& avx512_decode_kernel(DType dtype) { return avx512::decode_kernel(dtype); }
const HipKernel& avx512_hip_kernel(DType dtype) { return avx512::hip_kernel(dtype); }
const HipKernel& avx512_hip_rows_kernel(DType dtype) { return avx512::hip_rows_kernel(dtype); }

const BackwardKernel& avx512_backward_kernel(DType dtype) {
  return avx512::fma_backward_kernel(dtype);
}

const RowGradientKernel& avx512_row_gradients(DType dtype) {
  return avx512::row_gradient_kernel(dtype);
}

}  // namespace sparse_attn::cpu
#endif
