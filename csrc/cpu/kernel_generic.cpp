#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "decode.h"
#include "kernel.h"
#include "key_cursor.h"

#define SPARSE_ATTN_ISA generic
#define SPARSE_ATTN_VECTOR_BYTES 16
#include "decode_kernel.h"
#include "fma_kernel.h"

namespace sparse_attn::cpu {

const TileKernel& generic_kernel(DType dtype) { return generic::fma_kernel(dtype); }
const DecodeKernel& generic_decode_kernel(DType dtype) { return generic::decode_kernel(dtype); }

}  // namespace sparse_attn::cpu
