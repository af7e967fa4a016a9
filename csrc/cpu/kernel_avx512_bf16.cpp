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
#include "hip.h"
#include "kernel.h"
#include "key_cursor.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

#define SPARSE_ATTN_ISA avx512_bf16
#define SPARSE_ATTN_VECTOR_BYTES 64
#define SPARSE_ATTN_BFLOAT16_PAIRS
#include "fma_kernel.h"
#include "hip_rows_kernel.h"

// The gradients use parts of the forward kernel.
#include "backward_fma.h"

namespace sparse_attn::cpu {

const TileKernel& avx512_bf16_kernel() {
  return avx512_bf16::fma_kernel<avx512_bf16::BFloat16, avx512_bf16::BFloat16Pairs>();
}

const BackwardKernel& avx512_bf16_backward_kernel() {
  return avx512_bf16::fma_backward_kernel<avx512_bf16::BFloat16, avx512_bf16::BFloat16Pairs>();
}

const HipKernel& avx512_bf16_hip_rows_kernel() {
  return avx512_bf16::hip_rows_kernel<avx512_bf16::BFloat16, avx512_bf16::BFloat16Pairs>();
}

}  // namespace sparse_attn::cpu
#endif
