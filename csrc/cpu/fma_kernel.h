// The tile kernel in float32 fused multiply-adds, for any vector width. float16 and bfloat16 keys
// become float32 when they are packed.
//
// Packed K: [head_dim][32 keys]. Packed V: [32 keys][head_dim_v rounded up to 32].
#pragma once

#include "softmax_state.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

inline constexpr int64_t kFmaBlockM = 64;
inline constexpr int64_t kFmaGranules = 8;
inline constexpr int64_t kStepKeys = kFmaGranules * kGranule;

#if SPARSE_ATTN_VECTOR_BYTES == 64
inline constexpr int kMaxMicroRows = 12;
#else
inline constexpr int kMaxMicroRows = 6;
#endif

static inline int64_t padded_dim(int64_t n) { return (n + 31) / 32 * 32; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SPARSE_ATTN_INLINE float to_float(float x) { return x; }
SPARSE_ATTN_INLINE float to_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
SPARSE_ATTN_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t infinite = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  const float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | infinite | sign);
}

SPARSE_ATTN_INLINE void from_float(float x, float& result) { result = x; }
SPARSE_ATTN_INLINE void from_float(float x, BFloat16& result) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  result.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
SPARSE_ATTN_INLINE void from_float(float x, Float16& result) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let an addition round at the right bit
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  result.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

template <class T>
static void convert_row(const T* source, int64_t n, float factor, float* dest) {
  for (int64_t i = 0; i < n; ++i) dest[i] = to_float(source[i]) * factor;
}

template <class T>
static void pack_k(const void* const* rows, int64_t head_dim, void* granule) {
  float* dest = static_cast<float*>(granule);
  for (int64_t d0 = 0; d0 < head_dim; d0 += 16) {
    const int64_t d1 = std::min<int64_t>(head_dim, d0 + 16);
    for (int i = 0; i < kGranule; ++i) {
      const T* row = static_cast<const T*>(rows[i]);
      for (int64_t d = d0; d < d1; ++d) dest[d * kGranule + i] = to_float(row[d]);
    }
  }
}

template <class T>
static void pack_v(const void* const* rows, int64_t head_dim_v, void* granule) {
  float* dest = static_cast<float*>(granule);
  const int64_t padded = padded_dim(head_dim_v);
  for (int i = 0; i < kGranule; ++i) {
    convert_row(static_cast<const T*>(rows[i]), head_dim_v, 1.0f, dest + i * padded);
    std::fill(dest + i * padded + head_dim_v, dest + (i + 1) * padded, 0.0f);
  }
}

static int64_t k_granule_bytes(int64_t head_dim) { return head_dim * kGranule * 4; }
static int64_t v_granule_bytes(int64_t head_dim_v) { return padded_dim(head_dim_v) * kGranule * 4; }

// c[kRows][2 vectors] = a[kRows][n] b[n][2 vectors] (+ c), n = depth for each matrix of `b`.
template <int kRows>
static void multiply_rows(const float* a, int64_t a_stride, const float* const* b, int num_b,
                          int64_t b_offset, int64_t b_stride, int64_t depth, float* c,
                          int64_t c_stride, bool accumulate) {
  Vec sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = accumulate ? load(c + r * c_stride) : Vec{};
    sum[r][1] = accumulate ? load(c + r * c_stride + kLanes) : Vec{};
  }
  for (int i = 0; i < num_b; ++i) {
    const float* row = b[i] + b_offset;
    for (int64_t k = 0; k < depth; ++k, row += b_stride, ++a) {
      const Vec b0 = load(row), b1 = load(row + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec x = broadcast(a[r * a_stride]);
        sum[r][0] += x * b0;
        sum[r][1] += x * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(c + r * c_stride, sum[r][0]);
    store(c + r * c_stride + kLanes, sum[r][1]);
  }
}

using MultiplyRows = void (*)(const float*, int64_t, const float* const*, int, int64_t, int64_t,
                              int64_t, float*, int64_t, bool);

template <int... kRows>
static MultiplyRows multiply_rows_function(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr MultiplyRows kFunctions[] = {multiply_rows<kRows + 1>...};
  return kFunctions[rows - 1];
}

// c[rows][columns] = a b (+ c) with the rows cut into nearly equal parts for multiply_rows.
static void multiply(const float* a, int64_t a_stride, const float* const* b, int num_b,
                     int64_t b_stride, int64_t depth, float* c, int64_t c_stride, int64_t rows,
                     int64_t columns, bool accumulate) {
  for (int64_t column = 0; column < columns; column += 2 * kLanes) {
    int64_t parts = (rows + kMaxMicroRows - 1) / kMaxMicroRows;
    for (int64_t r = 0; r < rows; --parts) {
      const int64_t count = (rows - r + parts - 1) / parts;
      const MultiplyRows function = multiply_rows_function(
          static_cast<int>(count), std::make_integer_sequence<int, kMaxMicroRows>());
      function(a + r * a_stride, a_stride, b, num_b, column, b_stride, depth,
               c + r * c_stride + column, c_stride, accumulate);
      r += count;
    }
  }
}

// Bit i of `bits` becomes lane i: its score, or -inf.
SPARSE_ATTN_INLINE Vec keep_visible(Vec scores, uint32_t bits) {
  IntVec lane_bit;
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1 << i;
  const IntVec selected = (IntVec{} + static_cast<int32_t>(bits)) & lane_bit;
  return selected != 0 ? scores : broadcast(kMinusInfinity);
}

struct FmaScratch {
  float* q;       // [rows][head_dim]
  float* scores;  // [rows][kStepKeys], weights after the softmax
  float* acc;     // [rows][padded head_dim_v]
  float* m;       // [rows] running maximum, base 2
  float* l;       // [rows] running sum
};

// Turns one row of raw scores into weights and brings (m, l, acc) up to date.
static void softmax_row(const QueryTile& tile, const FmaScratch& scratch, const Granule* granules,
                        int num_granules, int64_t r, float scale) {
  float* scores = scratch.scores + r * kStepKeys;
  const int64_t n = num_granules * kGranule;
  Vec top = broadcast(kMinusInfinity);
  for (int64_t j = 0; j < n; j += kLanes) {
    Vec s = load(scores + j);
    if (tile.softcap > 0) {
      s = tanh(s * (scale / tile.softcap)) * static_cast<float>(tile.softcap * kLog2e);
    } else {
      s *= static_cast<float>(scale * kLog2e);
    }
    const uint32_t* visible = granules[j / kGranule].visible;
    if (visible != nullptr) s = keep_visible(s, visible[r] >> j % kGranule);
    store(scores + j, s);
    top = maximum(s, top);
  }
  const float m_old = scratch.m[r], m_new = std::max(m_old, reduce_max(top));
  if (m_new > m_old) {
    if (m_old != kMinusInfinity) {
      const float factor = std::exp2(m_old - m_new);
      scratch.l[r] *= factor;
      float* acc = scratch.acc + r * padded_dim(tile.head_dim_v);
      for (int64_t d = 0; d < padded_dim(tile.head_dim_v); d += kLanes) {
        store(acc + d, load(acc + d) * factor);
      }
    }
    scratch.m[r] = m_new;
  }
  const float base = m_new == kMinusInfinity ? 0.0f : m_new;
  Vec sum = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec p = exp2_nonpositive(load(scores + j) - base);
    store(scores + j, p);
    sum += p;
  }
  scratch.l[r] += reduce_add(sum);
}

template <class T>
static void write_rows(const QueryTile& tile, const FmaScratch& scratch) {
  const int64_t acc_stride = padded_dim(tile.head_dim_v);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const RowEnd end = finish_row(scratch.m[r], scratch.l[r], tile.sink_logit);
    const float* acc = scratch.acc + r * acc_stride;
    T* out = static_cast<T*>(tile.out) + r * tile.out_row_stride;
    for (int64_t d = 0; d < tile.head_dim_v; ++d) from_float(acc[d] * end.factor, out[d]);
    tile.lse[r] = end.lse;
  }
}

static FmaScratch divide_scratch(std::byte* memory, int64_t head_dim_v) {
  FmaScratch scratch;
  scratch.scores = reinterpret_cast<float*>(memory);
  scratch.acc = scratch.scores + kFmaBlockM * kStepKeys;
  scratch.m = scratch.acc + kFmaBlockM * padded_dim(head_dim_v);
  scratch.l = scratch.m + kFmaBlockM;
  scratch.q = scratch.l + kFmaBlockM;
  return scratch;
}

static int64_t fma_scratch_bytes(int64_t head_dim, int64_t head_dim_v) {
  return kFmaBlockM * (kStepKeys + padded_dim(head_dim_v) + 2 + head_dim) * 4;
}

// Attention of one query tile over all keys that the cursor hands out.
template <class T>
static void run_tile(const QueryTile& tile, KeyCursor& keys, std::byte* memory) {
  const FmaScratch scratch = divide_scratch(memory, tile.head_dim_v);
  const int64_t acc_stride = padded_dim(tile.head_dim_v);
  const ScoreScale scaling = split_scale(tile.scale);
  for (int64_t r = 0; r < tile.rows; ++r) {
    convert_row(static_cast<const T*>(tile.q) + r * tile.q_row_stride, tile.head_dim,
                scaling.q_factor, scratch.q + r * tile.head_dim);
  }
  std::fill(scratch.acc, scratch.acc + tile.rows * acc_stride, 0.0f);
  std::fill(scratch.m, scratch.m + tile.rows, kMinusInfinity);
  std::fill(scratch.l, scratch.l + tile.rows, 0.0f);

  Granule granules[kFmaGranules];
  while (const int n = keys.next(granules)) {
    const float* v[kFmaGranules];
    for (int g = 0; g < n; ++g) {
      const float* k = static_cast<const float*>(granules[g].k);
      v[g] = static_cast<const float*>(granules[g].v);
      multiply(scratch.q, tile.head_dim, &k, 1, kGranule, tile.head_dim,
               scratch.scores + g * kGranule, kStepKeys, tile.rows, kGranule, false);
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      softmax_row(tile, scratch, granules, n, r, scaling.scale);
    }
    multiply(scratch.scores, kStepKeys, v, n, acc_stride, kGranule, scratch.acc, acc_stride,
             tile.rows, acc_stride, true);
  }
  write_rows<T>(tile, scratch);
}

// Flushes denormal results to zero while a kernel runs.
static uint32_t enter_kernel() {
#if defined(__x86_64__)
  const uint32_t saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8000);
  return saved;
#else
  return 0;
#endif
}

static void leave_kernel(uint32_t saved) {
#if defined(__x86_64__)
  _mm_setcsr(saved);
#else
  (void)saved;
#endif
}

template <class T>
static const TileKernel& fma_kernel() {
  static constexpr TileKernel kKernel = {
      kFmaBlockM, kFmaGranules, k_granule_bytes,   v_granule_bytes, kGranule * 4, 0,
      pack_k<T>,  pack_v<T>,    fma_scratch_bytes, run_tile<T>,     enter_kernel, leave_kernel};
  return kKernel;
}

static inline const TileKernel& fma_kernel(DType dtype) {
  if (dtype == DType::kBFloat16) return fma_kernel<BFloat16>();
  if (dtype == DType::kFloat16) return fma_kernel<Float16>();
  return fma_kernel<float>();
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
