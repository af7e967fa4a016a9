// The decode kernel in float32 fused multiply-adds, for any vector width.
#pragma once

#include "cpu/kernels/by_dtype.h"
#include "cpu/kernels/decode_kernel.h"
#include "cpu/simd/denormals.h"
#include "cpu/simd/softmax_state.h"
#include "cpu/simd/words.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Rows that share the loading of a key, and the vectors of their accumulators held at once.
inline constexpr int kDecodeRows = kLanes == 16 ? 4 : 2;
inline constexpr int kDecodeVecs = 4;

constexpr int half_index(int width, int upper, int i) {
  const int half = width / 2, segments = kLanes / width, segment = i / half;
  return segment / segments * kLanes + segment % segments * width + upper * half + i % half;
}

// Adds the upper half of each segment of `kWidth` lanes to its lower half; those of a, then of b.
template <int kWidth, int... kIndex>
SPARSE_ATTN_INLINE Vec add_halves(Vec a, Vec b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, half_index(kWidth, 0, kIndex)...) +
         __builtin_shufflevector(a, b, half_index(kWidth, 1, kIndex)...);
}

// Lane i is the sum of the lanes of x[i].
template <int kWidth = kLanes>
SPARSE_ATTN_INLINE Vec add_across(Vec* x) {
  if constexpr (kWidth == 1) {
    return x[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      x[i] = add_halves<kWidth>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, kLanes>());
    }
    return add_across<kWidth / 2>(x);
  }
}

// Not into the first-level cache, half of which the keys of a batch would take: some processors
// then read memory at half their rate.
static inline void prefetch_row(const void* row, int64_t bytes) {
  constexpr int kSecondLevel = 1;
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const std::byte*>(row) + i, 0, kSecondLevel);
  }
}

// scores[r][key] = q[r] . k[key] for kRows rows and all keys of a batch.
template <class T, int kRows>
static void score_keys(const KeyBatch& keys, const KeyBatch& next, const float* q, int64_t q_stride,
                       int64_t head_dim, float* scores) {
  constexpr int kKeys = kLanes / (kRows == 3 ? 4 : kRows);
  for (int j = 0; j < keys.count; j += kKeys) {
    for (int i = j; i < std::min(j + kKeys, next.count); ++i) {
      prefetch_row(next.k[i], head_dim * sizeof(T));
    }
    Vec sum[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sum[i] = Vec{};
    const auto multiply_dims = [&](int64_t d, auto load_key) __attribute__((always_inline)) {
      Vec x[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) x[r] = load(q + r * q_stride + d);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec y = load_key(static_cast<const T*>(keys.k[j + i]) + d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[r * kKeys + i] += x[r] * y;
      }
    };
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) {
      multiply_dims(d, [](const T* p) { return load_floats(p); });
    }
    if (d < head_dim) {
      multiply_dims(d, [=](const T* p) { return load_floats(p, head_dim - d); });
    }
    float total[kLanes];
    store(total, add_across(sum));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(scores + r * kBatchKeys + j, total + r * kKeys, kKeys * sizeof(float));
    }
  }
}

// acc[r][d ...] += sum over keys of weights[r][key] v[key][d ...], for kVecs vectors; of the last
// one only `tail` lanes exist if that is not 0.
template <class T, int kRows, int kVecs>
static void add_values(const KeyBatch& keys, const KeyBatch& next, const float* weights, int64_t d,
                       int64_t tail, float* acc, int64_t acc_stride) {
  constexpr int64_t bytes = kVecs * kLanes * sizeof(T);
  Vec sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) sum[r][i] = load(acc + r * acc_stride + d + i * kLanes);
  }
  for (int j = 0; j < keys.count; ++j) {
    const T* v = static_cast<const T*>(keys.v[j]) + d;
    if (j < next.count) prefetch_row(static_cast<const T*>(next.v[j]) + d, bytes);
    Vec y[kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      y[i] = kVecs == 1 && tail > 0 ? load_floats(v, tail) : load_floats(v + i * kLanes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec p = broadcast(weights[r * kBatchKeys + j]);
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) sum[r][i] += p * y[i];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) store(acc + r * acc_stride + d + i * kLanes, sum[r][i]);
  }
}

struct DecodeScratch {
  float* q;       // [rows][q_stride]
  float* scores;  // [rows][kBatchKeys], weights after the softmax
  int64_t q_stride;
};

static inline int64_t decode_q_stride(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

static int64_t decode_scratch_bytes(int64_t rows, int64_t head_dim) {
  return rows * (decode_q_stride(head_dim) + kBatchKeys) * static_cast<int64_t>(sizeof(float));
}

template <class T, int kRows>
static void score_rows(const DecodeTile& tile, const DecodeScratch& scratch, int64_t r,
                       const KeyBatch& keys, const KeyBatch& next) {
  score_keys<T, kRows>(keys, next, scratch.q + r * scratch.q_stride, scratch.q_stride,
                       tile.head_dim, scratch.scores + r * kBatchKeys);
}

template <class T, int kRows>
static void add_all_values(const DecodeTile& tile, const DecodeScratch& scratch, int64_t r,
                           const KeyBatch& keys, const KeyBatch& next, float* acc) {
  const int64_t stride = state_dims(tile.head_dim_v), dims = tile.head_dim_v;
  const float* weights = scratch.scores + r * kBatchKeys;
  acc += r * stride;
  int64_t d = 0;
  for (; d + kDecodeVecs * kLanes <= dims; d += kDecodeVecs * kLanes) {
    add_values<T, kRows, kDecodeVecs>(keys, next, weights, d, 0, acc, stride);
  }
  for (; d < dims; d += kLanes) {
    const int64_t tail = dims - d < kLanes ? dims - d : 0;
    add_values<T, kRows, 1>(keys, next, weights, d, tail, acc, stride);
  }
}

// Calls f(integral_constant<int, count>, first) for nearly equal parts of the rows.
template <class F>
SPARSE_ATTN_INLINE void for_row_parts(int64_t rows, F&& f) {
  int64_t parts = (rows + kDecodeRows - 1) / kDecodeRows;
  for (int64_t r = 0; r < rows; --parts) {
    const int64_t count = (rows - r + parts - 1) / parts;
    if (count == 1) f(std::integral_constant<int, 1>(), r);
    if (count == 2) f(std::integral_constant<int, 2>(), r);
    if constexpr (kDecodeRows == 4) {
      if (count == 3) f(std::integral_constant<int, 3>(), r);
      if (count == 4) f(std::integral_constant<int, 4>(), r);
    }
    r += count;
  }
}

// Turns products q.k of one row into weights exp(s - m) and brings (m, l, acc) up to date. If a
// score is no number, nor is l; if one is infinite besides, nor is m. While all scores are -inf, l
// tells that there are some. `terms`, for the row as the tile's `query`-th, count if kBiased.
template <bool kBiased>
static void update_row(const DecodeTile& tile, int count, uint64_t visible,
                       const KeyTerms<kBatchKeys>& terms, int64_t query, float* scores, float& m,
                       float& l, float* acc) {
  constexpr float kBase2 = kLog2e;
  Vec top = broadcast(kMinusInfinity);
  for (int j = 0; j < count; j += kLanes) {
    Vec s = load(scores + j) * tile.scale;
    if (tile.softcap > 0) s = cap_softly(s, tile.softcap);
    if constexpr (kBiased) {
      const Vec distance = absolute(static_cast<float>(query) - load(terms.offset + j));
      s += load(terms.bias + j) - terms.slope * distance;
    }
    constexpr uint32_t kAllLanes = (uint32_t{1} << kLanes) - 1;
    const uint32_t seen = static_cast<uint32_t>(visible >> j) & kAllLanes;
    if (seen != kAllLanes) s = keep_visible(s, seen);
    store(scores + j, s);
    top = maximum(s, top);
  }
  const float m_old = m;
  float m_new = std::max(m_old, reduce_max(top));
  if (m_new == kInfinity) {
    const bool has_nan = std::any_of(scores, scores + count, [](float s) { return s != s; });
    if (has_nan || (m_old < kInfinity && l != l)) m_new = kNaN;
  }
  if (!(m_new <= m_old)) {
    if (m_old == kMinusInfinity) {
      if (l == l) l = 0;
    } else {
      const float factor = std::exp2((m_old - m_new) * kBase2);
      l *= factor;
      for (int64_t d = 0; d < state_dims(tile.head_dim_v); d += kLanes) {
        store(acc + d, load(acc + d) * factor);
      }
    }
    m = m_new;
  }
  const float base = m_new == kMinusInfinity ? 0.0f : m_new;
  Vec sum = {};
  for (int j = 0; j < count; j += kLanes) {
    const Vec p = exp2_nonpositive(load(scores + j) - base, kBase2);
    store(scores + j, p);
    sum += p;
  }
  l += reduce_add(sum);
  if (m == kMinusInfinity && visible != 0 && l == l) l = 1;
}

// Attention of one tile over all keys that are handed out.
template <class T>
static void run_decode(const DecodeTile& tile, DecodeKeys& keys, float* state, std::byte* memory) {
  const int64_t rows = tile.rows(), dims = state_dims(tile.head_dim_v);
  DecodeScratch scratch;
  scratch.q = reinterpret_cast<float*>(memory);
  scratch.q_stride = decode_q_stride(tile.head_dim);
  scratch.scores = scratch.q + rows * scratch.q_stride;
  float* acc = state;
  float* m = state + rows * dims;
  float* l = m + rows;
  for (int64_t r = 0; r < rows; ++r) {
    const T* q = static_cast<const T*>(tile.q) + r / tile.queries * tile.q_head_stride +
                 r % tile.queries * tile.q_row_stride;
    float* dest = scratch.q + r * scratch.q_stride;
    convert_row(q, tile.head_dim, dest);
    std::fill(dest + tile.head_dim, dest + scratch.q_stride, 0.0f);
  }
  std::fill(acc, acc + rows * dims, 0.0f);
  std::fill(m, m + rows, kMinusInfinity);
  std::fill(l, l + rows, 0.0f);

  static const KeyBatch kNoKeys = {};
  KeyBatch batches[2];
  KeyBatch* now = batches;
  KeyBatch* next = batches + 1;
  KeyTerms<kBatchKeys> terms;
  const bool is_biased = keys.is_biased();
  for (keys.next(*now); now->count > 0; std::swap(now, next)) {
    keys.next(*next);
    for_row_parts(rows, [&](auto count, int64_t r) {
      score_rows<T, count()>(tile, scratch, r, *now, r == 0 ? *next : kNoKeys);
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t query = r % tile.queries;
      if (is_biased && query == 0) keys.describe(*now, r / tile.queries, terms);
      const auto update = is_biased ? update_row<true> : update_row<false>;
      update(tile, now->count, now->visible[query], terms, query, scratch.scores + r * kBatchKeys,
             m[r], l[r], acc + r * dims);
    }
    for_row_parts(rows, [&](auto count, int64_t r) {
      add_all_values<T, count()>(tile, scratch, r, *now, r == 0 ? *next : kNoKeys, acc);
    });
  }
}

template <class T>
static uint64_t finish_decode(const DecodeTile& tile, const float* states, int64_t num_states) {
  const int64_t rows = tile.rows(), dims = state_dims(tile.head_dim_v);
  const int64_t stride = state_floats(rows, tile.head_dim_v);
  uint64_t repeated = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* acc = states + r * dims;
    const float* m = states + rows * dims + r;
    const float* l = m + rows;
    float top = kMinusInfinity, sum = 0.0f;
    for (int64_t s = 0; s < num_states; ++s) {
      const bool is_nan = l[s * stride] != l[s * stride] && m[s * stride] < kInfinity;
      top = maximum_or_nan(is_nan ? kNaN : m[s * stride], top);
    }
    const float base = top == kMinusInfinity ? 0.0f : top;
    float total[kMaxHeadDim] = {};
    for (int64_t s = 0; s < num_states; ++s) {
      const float factor = std::exp2((m[s * stride] - base) * static_cast<float>(kLog2e));
      sum += l[s * stride] * (top == kMinusInfinity ? 1.0f : factor);
      for (int64_t d = 0; d < dims; d += kLanes) {
        store(total + d, load(total + d) + load(acc + s * stride + d) * factor);
      }
    }
    const int64_t head = r / tile.queries, row = r % tile.queries;
    const float* sink_logit = tile.sink_logits != nullptr ? tile.sink_logits + head : nullptr;
    const RowEnd end = finish_row(top, sum, sink_logit);
    T* out = static_cast<T*>(tile.out) + head * tile.out_head_stride + row * tile.out_row_stride;
    round_row(total, end.factor, tile.head_dim_v, out);
    tile.lse[head * tile.lse_head_stride + row] = end.lse;
    if (!all_finite(total, dims)) repeated |= uint64_t{1} << r;
  }
  return repeated;
}

template <class T>
static constexpr DecodeKernel kFmaDecode = {
    .scratch_bytes = decode_scratch_bytes,
    .run = run_decode<T>,
    .finish = finish_decode<T>,
    .enter = enter_kernel,
    .leave = leave_kernel,
};

static constexpr ByDType<DecodeKernel> kFmaDecodes = {
    .float32 = &kFmaDecode<float>,
    .bfloat16 = &kFmaDecode<BFloat16>,
    .float16 = &kFmaDecode<Float16>,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
