// The gradient kernel in fused multiply-adds, for any vector width; sums are float32.
//
// A query tile holds q, dout and dq as [rows][dim]. Scratch memory holds, for each granule of the
// key tile, k and v as [dim][32 keys] and k as [32 keys][dim], and dk and dv as [keys][dim]. Row
// strides are dims rounded up to 32. Factors are words of one number, or of two that follow each
// other in the dimension which a product sums over: then what takes part in two kinds of products,
// q, dout and ds, is there in two forms.
#pragma once

#include "cpu/kernels/backward_kernel.h"
#include "cpu/kernels/by_dtype.h"
#include "cpu/simd/denormals.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/softmax_state.h"
#include "cpu/simd/words.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

#if SPARSE_ATTN_VECTOR_BYTES == 64
inline constexpr int kMaxMicroRows = 12;
#else
inline constexpr int kMaxMicroRows = 6;
#endif

// Rows of all matrices are so long that products take whole pairs of vectors.
static inline int64_t padded_columns(int64_t n) { return (n + 31) / 32 * 32; }

inline constexpr int64_t kMaxBackwardRows = 64;

// c[kRows][2 vectors] = a[kRows][depth] b[depth][2 vectors] (+ c); word (r, i) of `a` is at
// a[r * a_row + i * a_step], so that `a` may be a transposed matrix. What was in c is added last: a
// long sum is one of short sums, and rounds less.
template <class Words, int kRows>
static void product_rows(const typename Words::Word* a, int64_t a_row, int64_t a_step,
                         const typename Words::Word* b, int64_t b_step, int64_t depth, float* c,
                         int64_t c_row, bool accumulate) {
  Vec sum[kRows][2] = {};
#pragma GCC unroll 4
  for (int64_t i = 0; i < depth; ++i, a += a_step, b += b_step) {
    const Vec b0 = Words::load_words(b), b1 = Words::load_words(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = Words::broadcast_word(a[r * a_row]);
      sum[r][0] = Words::multiply_add(x, b0, sum[r][0]);
      sum[r][1] = Words::multiply_add(x, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (accumulate) {
      sum[r][0] += load(c + r * c_row);
      sum[r][1] += load(c + r * c_row + kLanes);
    }
    store(c + r * c_row, sum[r][0]);
    store(c + r * c_row + kLanes, sum[r][1]);
  }
}

template <class Words>
using ProductRows = void (*)(const typename Words::Word*, int64_t, int64_t,
                             const typename Words::Word*, int64_t, int64_t, float*, int64_t, bool);

template <class Words, int... kRows>
static ProductRows<Words> product_rows_function(int64_t rows,
                                                std::integer_sequence<int, kRows...>) {
  static constexpr ProductRows<Words> kFunctions[] = {product_rows<Words, kRows + 1>...};
  return kFunctions[rows - 1];
}

// A matrix whose word (r, i) is at data[r * row + i * step].
template <class Words>
struct Matrix {
  const typename Words::Word* data;
  int64_t row, step;
};

// c[rows][columns] = a b (+ c), with b [depth][columns] and the rows cut into nearly equal parts.
template <class Words>
static void product(const Matrix<Words>& a, const typename Words::Word* b, int64_t b_step,
                    int64_t depth, float* c, int64_t c_row, int64_t rows, int64_t columns,
                    bool accumulate) {
  for (int64_t column = 0; column < columns; column += 2 * kLanes) {
    int64_t parts = (rows + kMaxMicroRows - 1) / kMaxMicroRows;
    for (int64_t r = 0; r < rows; --parts) {
      const int64_t count = (rows - r + parts - 1) / parts;
      const auto function =
          product_rows_function<Words>(count, std::make_integer_sequence<int, kMaxMicroRows>());
      function(a.data + r * a.row, a.row, a.step, b + column, b_step, depth, c + r * c_row + column,
               c_row, accumulate);
      r += count;
    }
  }
}

template <class Words>
struct PackedQueries {
  using Word = typename Words::Word;

  QueryTileHead head;
  float* dq;
  Word *q, *dout;            // words of dims
  Word *q_rows, *dout_rows;  // words of rows

  PackedQueries(const TileShape& shape, std::byte* tile) : head(tile, shape.rows) {
    const int64_t size = shape.rows * padded_columns(shape.head_dim);
    const int64_t words = size / Words::kNumbers;
    const int64_t words_v = shape.rows * padded_columns(shape.head_dim_v) / Words::kNumbers;
    dq = reinterpret_cast<float*>(tile + QueryTileHead::bytes(shape.rows));
    q_rows = reinterpret_cast<Word*>(dq + size);
    dout_rows = q_rows + words;
    q = q_rows;
    dout = dout_rows;
    if (Words::kNumbers == 1) return;
    q = dout_rows + words_v;
    dout = q + words;
  }
  static int64_t bytes(const TileShape& shape) {
    return QueryTileHead::bytes(shape.rows) +
           shape.rows * (2 * padded_columns(shape.head_dim) + padded_columns(shape.head_dim_v)) * 4;
  }
};

template <class Words>
struct BackwardScratch {
  using Word = typename Words::Word;

  float *dk, *dv;
  Word* k;                            // words of keys
  Word *k_transposed, *v_transposed;  // words of dims
  // Of one granule, [rows][32 keys]: scores and dp, then p and ds as words of rows.
  float *p, *ds;
  Word* ds_keys;  // words of keys

  BackwardScratch(const TileShape& shape, std::byte* memory) {
    const int64_t k_size = kKeyTile * padded_columns(shape.head_dim);
    const int64_t v_size = kKeyTile * padded_columns(shape.head_dim_v);
    const int64_t step = shape.rows * kGranule;
    dk = reinterpret_cast<float*>(memory);
    dv = dk + k_size;
    p = dv + v_size;
    ds = p + step;
    k = reinterpret_cast<Word*>(ds + step);
    k_transposed = k + k_size / Words::kNumbers;
    v_transposed = k_transposed + k_size / Words::kNumbers;
    ds_keys = Words::kNumbers == 1 ? reinterpret_cast<Word*>(ds)
                                   : v_transposed + v_size / Words::kNumbers;
  }
  static int64_t bytes(const TileShape& shape) {
    return (kKeyTile * (3 * padded_columns(shape.head_dim) + 2 * padded_columns(shape.head_dim_v)) +
            3 * shape.rows * kGranule) *
           4;
  }
};

// A row as words of dims, followed by zeros.
template <class T, class Words>
static void pack_row(const void* source, int64_t dim, typename Words::Word* dest) {
  copy_words<T, Words>(source, dim, dest);
  std::fill(dest + num_words<Words>(dim), dest + padded_columns(dim) / Words::kNumbers, 0);
}

// Rows as words of rows, followed by zeros.
template <class T, class Words>
static void pack_joined(const void* const* rows, int64_t num_rows, int64_t dim,
                        typename Words::Word* dest) {
  for (int64_t r = 0; r < num_rows; r += Words::kNumbers, dest += padded_columns(dim)) {
    join_rows<T, Words>(rows + r, dim, dest);
    std::fill(dest + dim, dest + padded_columns(dim), 0);
  }
}

// dest[words of dims][32 rows]
template <class T, class Words>
static void pack_transposed(const void* const* rows, int64_t dim, typename Words::Word* dest) {
  alignas(64) typename Words::Word block[kLanes][kMaxHeadDim];
  for (int first = 0; first < kGranule; first += kLanes) {
    for (int i = 0; i < kLanes; ++i) pack_row<T, Words>(rows[first + i], dim, block[i]);
    for (int64_t d = 0; d < num_words<Words>(dim); d += kLanes) {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = Words::load_words(block[i] + d);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) {
        std::memcpy(dest + (d + i) * kGranule + first, &x[i], sizeof(Vec));
      }
    }
  }
}

template <class T, class Words>
static void pack_queries(const TileShape& shape, const void* const* q, const void* const* dout,
                         const void* const* out, std::byte* tile) {
  const PackedQueries<Words> packed(shape, tile);
  const int64_t dim = padded_columns(shape.head_dim), dim_v = padded_columns(shape.head_dim_v);
  pack_joined<T, Words>(q, shape.rows, shape.head_dim, packed.q_rows);
  pack_joined<T, Words>(dout, shape.rows, shape.head_dim_v, packed.dout_rows);
  float out_row[kMaxHeadDim], dout_row[kMaxHeadDim];
  for (int64_t r = 0; r < shape.rows; ++r) {
    if constexpr (Words::kNumbers > 1) {
      pack_row<T, Words>(q[r], shape.head_dim, packed.q + r * dim / Words::kNumbers);
      pack_row<T, Words>(dout[r], shape.head_dim_v, packed.dout + r * dim_v / Words::kNumbers);
    }
    pack_row<T, FloatWords>(out[r], shape.head_dim_v, out_row);
    pack_row<T, FloatWords>(dout[r], shape.head_dim_v, dout_row);
    Vec sum = {};
    for (int64_t d = 0; d < dim_v; d += kLanes) sum += load(out_row + d) * load(dout_row + d);
    packed.head.delta[r] = reduce_add(sum);
  }
}

template <class T, class Words>
static void pack_keys(const TileShape& shape, const void* const* k, const void* const* v,
                      std::byte* memory) {
  const BackwardScratch<Words> scratch(shape, memory);
  const int64_t dim = padded_columns(shape.head_dim), dim_v = padded_columns(shape.head_dim_v);
  pack_joined<T, Words>(k, kKeyTile, shape.head_dim, scratch.k);
  for (int64_t j = 0; j < kKeyTile; j += kGranule) {
    pack_transposed<T, Words>(k + j, shape.head_dim,
                              scratch.k_transposed + j * dim / Words::kNumbers);
    pack_transposed<T, Words>(v + j, shape.head_dim_v,
                              scratch.v_transposed + j * dim_v / Words::kNumbers);
  }
  std::fill(scratch.dk, scratch.dk + kKeyTile * dim, 0.0f);
  std::fill(scratch.dv, scratch.dv + kKeyTile * dim_v, 0.0f);
}

// What is added to the scores of a vector of keys, and sums over rows for its gradient.
struct BiasLanes {
  Vec bias, offset, dbias = {}, dslope = {};
};

// Turns raw scores of one row and a vector of keys into p, and dp into ds.
template <bool kBiased>
SPARSE_ATTN_INLINE void differentiate(const TileShape& shape, float lse, float delta,
                                      uint32_t visible, float row, float alibi_slope,
                                      BiasLanes& lanes, Vec& p, Vec& ds) {
  constexpr float kBase2 = kLog2e;
  Vec slope = broadcast(1.0f), factor = p, distance;
  float scale = shape.scale;
  if (shape.softcap > 0) {
    factor = tanh(p * (shape.scale / shape.softcap));
    slope -= factor * factor;
    scale = shape.softcap;
  }
  Vec logit = factor * scale - lse;
  if constexpr (kBiased) {
    distance = absolute(row - lanes.offset);
    logit = factor * scale + (lanes.bias - alibi_slope * distance) - lse;
  }
  p = exp2_nonpositive(keep_visible(logit, visible) * kBase2);
  if constexpr (kBiased) {
    const Vec dbias = p == 0.0f ? Vec{} : p * (ds - delta);
    lanes.dbias += dbias;
    lanes.dslope -= dbias * distance;
  }
  ds = p == 0.0f ? Vec{} : p * (ds - delta) * slope;
}

// The same for the rows [first, first + count) of a query tile and all keys of a granule, whose
// scores begin with that row. `visit` is called for each row. The bias of the key tile is null
// unless kBiased; the granule's first key is its `key`-th.
template <bool kBiased, class Words>
static void differentiate_rows(const TileShape& shape, const QueryTileHead& head, int64_t first,
                               int64_t count, const uint32_t* visible,
                               const BackwardScratch<Words>& scratch, KeyTileBias* bias,
                               int64_t key, auto visit) {
  constexpr int kNumbers = Words::kNumbers;
  BiasLanes lanes[kGranule / kLanes];
  const float alibi_slope = kBiased ? bias->terms.slope : 0.0f;
  for (int j = 0; kBiased && j < kGranule; j += kLanes) {
    lanes[j / kLanes].bias = load(bias->terms.bias + key + j);
    lanes[j / kLanes].offset = load(bias->terms.offset + key + j);
  }
  float *p_words = scratch.p, *ds_words = scratch.ds;
  for (int64_t r = 0; r < count; r += kNumbers, p_words += kGranule, ds_words += kGranule) {
    Vec ds[kNumbers][kGranule / kLanes];
    for (int n = 0; n < kNumbers; ++n) visit();
    for (int j = 0; j < kGranule; j += kLanes) {
      Vec p_lanes[kNumbers], ds_lanes[kNumbers];
      for (int n = 0; n < kNumbers; ++n) {
        const int64_t row = first + r + n;
        p_lanes[n] = load(scratch.p + (r + n) * kGranule + j);
        ds_lanes[n] = load(scratch.ds + (r + n) * kGranule + j);
        differentiate<kBiased>(shape, head.lse[row], head.delta[row],
                               visible != nullptr ? visible[row] >> j : ~uint32_t{0},
                               static_cast<float>(row), alibi_slope, lanes[j / kLanes], p_lanes[n],
                               ds_lanes[n]);
        ds[n][j / kLanes] = ds_lanes[n];
      }
      store(p_words + j, Words::join(p_lanes));
      store(ds_words + j, Words::join(ds_lanes));
    }
    if constexpr (kNumbers > 1) {
      for (int n = 0; n < kNumbers; ++n) {
        const auto words = Words::round(ds[n][0], ds[n][1]);
        std::memcpy(scratch.ds_keys + (r + n) * (kGranule / kNumbers), &words, sizeof(words));
      }
    }
  }
  for (int j = 0; kBiased && j < kGranule; ++j) {
    bias->dbias[key + j] += lanes[j / kLanes].dbias[j % kLanes];
    bias->dslope += lanes[j / kLanes].dslope[j % kLanes];
  }
}

template <class Words>
static void add_pair(const TileShape& shape, const Visibility& visibility, bool first,
                     std::byte* tile, const std::byte* tile_ahead, KeyTileBias* bias,
                     std::byte* memory) {
  using Word = typename Words::Word;
  constexpr int64_t kNumbers = Words::kNumbers;
  const PackedQueries<Words> queries(shape, tile);
  const BackwardScratch<Words> scratch(shape, memory);
  const int64_t dim = padded_columns(shape.head_dim), dim_v = padded_columns(shape.head_dim_v);
  const Matrix<Words> p_transposed = {reinterpret_cast<const Word*>(scratch.p), 1, kGranule};
  const Matrix<Words> ds_transposed = {reinterpret_cast<const Word*>(scratch.ds), 1, kGranule};
  if (first) std::fill(queries.dq, queries.dq + shape.rows * dim, 0.0f);
  Prefetch next_tile(tile_ahead, PackedQueries<Words>::bytes(shape));
  next_tile.spread_over(visibility.count * shape.rows);
  for (int n = 0; n < visibility.count; ++n) {
    const auto [granule, visible, seeing] = visibility.parts[n];
    const int64_t key = granule * kGranule, row = seeing.begin / kNumbers * kNumbers;
    const int64_t end = std::min<int64_t>(seeing.end, shape.rows);
    const int64_t row_words = num_words<Words>(end - row), rows = row_words * kNumbers;
    const Word *q_rows = queries.q_rows + row / kNumbers * dim,
               *dout_rows = queries.dout_rows + row / kNumbers * dim_v;
    product<Words>({queries.q + row * dim / kNumbers, dim / kNumbers, 1},
                   scratch.k_transposed + key * dim / kNumbers, kGranule,
                   num_words<Words>(shape.head_dim), scratch.p, kGranule, rows, kGranule, false);
    product<Words>({queries.dout + row * dim_v / kNumbers, dim_v / kNumbers, 1},
                   scratch.v_transposed + key * dim_v / kNumbers, kGranule,
                   num_words<Words>(shape.head_dim_v), scratch.ds, kGranule, rows, kGranule, false);
    const auto visit = [&] { next_tile.next(); };
    if (bias != nullptr) {
      differentiate_rows<true>(shape, queries.head, row, rows, visible, scratch, bias, key, visit);
    } else {
      differentiate_rows<false>(shape, queries.head, row, rows, visible, scratch, bias, key, visit);
    }
    product<Words>(p_transposed, dout_rows, dim_v, row_words, scratch.dv + key * dim_v, dim_v,
                   kGranule, dim_v, true);
    product<Words>(ds_transposed, q_rows, dim, row_words, scratch.dk + key * dim, dim, kGranule,
                   dim, true);
    product<Words>({scratch.ds_keys, kGranule / kNumbers, 1}, scratch.k + key * dim / kNumbers, dim,
                   kGranule / kNumbers, queries.dq + row * dim, dim, rows, dim, true);
  }
}

template <class T>
static void write_gradient_rows(const float* source, int64_t rows, int64_t dim, float factor,
                                void* dest) {
  T* row = static_cast<T*>(dest);
  for (int64_t r = 0; r < rows; ++r, row += dim, source += padded_columns(dim)) {
    round_row(source, factor, dim, row);
  }
}

template <class T, class Words>
static void write_queries(const TileShape& shape, std::byte* tile, int64_t rows, void* dq) {
  const PackedQueries<Words> queries(shape, tile);
  write_gradient_rows<T>(queries.dq, rows, shape.head_dim, shape.scale, dq);
}

template <class T, class Words>
static void write_keys(const TileShape& shape, std::byte* memory, int64_t keys, void* dk,
                       void* dv) {
  const BackwardScratch<Words> scratch(shape, memory);
  write_gradient_rows<T>(scratch.dk, keys, shape.head_dim, shape.scale, dk);
  write_gradient_rows<T>(scratch.dv, keys, shape.head_dim_v, 1.0f, dv);
}

template <class T, class Words = FloatWords>
static constexpr BackwardKernel kFmaBackward = {
    .max_rows = kMaxBackwardRows,
    .query_tile_bytes = PackedQueries<Words>::bytes,
    .scratch_bytes = BackwardScratch<Words>::bytes,
    .pack_queries = pack_queries<T, Words>,
    .pack_keys = pack_keys<T, Words>,
    .add_pair = add_pair<Words>,
    .write_queries = write_queries<T, Words>,
    .write_keys = write_keys<T, Words>,
    .enter = enter_kernel,
    .leave = leave_kernel,
};

static constexpr ByDType<BackwardKernel> kFmaBackwards = {
    .float32 = &kFmaBackward<float>,
    .bfloat16 = &kFmaBackward<BFloat16>,
    .float16 = &kFmaBackward<Float16>,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
