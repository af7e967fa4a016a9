#if defined(__x86_64__)
#include "cpu/isa/kernels.h"
#include "cpu/kernels/key_cursor.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/standard_headers.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

#define SPARSE_ATTN_ISA avx512_bf16
#define SPARSE_ATTN_VECTOR_BYTES 64
#define SPARSE_ATTN_BFLOAT16_PAIRS
#include "cpu/kernels/backward_fma.h"
#include "cpu/kernels/hip_rows_fma.h"
#include "cpu/kernels/tile_fma.h"

namespace sparse_attn::cpu {

extern constinit const Kernels kAvx512Bf16Kernels = {
    .tile = {.bfloat16 = &avx512_bf16::kFmaTile<avx512_bf16::BFloat16, avx512_bf16::BFloat16Pairs>},
    .backward = {.bfloat16 =
                     &avx512_bf16::kFmaBackward<avx512_bf16::BFloat16, avx512_bf16::BFloat16Pairs>},
    .hip_of_rows =
        {.bfloat16 =
             &avx512_bf16::kFmaHipOfRows<avx512_bf16::BFloat16, avx512_bf16::BFloat16Pairs>},
};

}  // namespace sparse_attn::cpu
#endif
