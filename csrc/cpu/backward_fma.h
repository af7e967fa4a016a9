// The gradient kernel in float32 fused multiply-adds, for any vector width.
//
// A query tile holds q, dout and dq as [rows][dim]. Scratch memory holds, for each granule of the
// key tile, k and v as [dim][32 keys] and k as [32 keys][dim], and dk and dv as [keys][dim]. Row
// strides are dims rounded up to 32.
#pragma once

#include "backward_kernel.h"
#include "prefetch.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

#if SPARSE_ATTN_VECTOR_BYTES == 64
inline constexpr int kMaxMicroRows = 12;
#else
inline constexpr int kMaxMicroRows = 6;
#endif

// Rows of all matrices are so long that products take whole pairs of vectors.
static inline int64_t padded_columns(int64_t n) { return (n + 31) / 32 * 32; }

inline constexpr int64_t kMaxBackwardRows = 64;

// c[kRows][2 vectors] = a[kRows][depth] b[depth][2 vectors] (+ c); element (r, i) of `a` is at
// a[r * a_row + i * a_step], so that `a` may be a transposed matrix. What was in c is added last: a
// long sum is one of short sums, and rounds less.
template <int kRows>
static void product_rows(const float* a, int64_t a_row, int64_t a_step, const float* b,
                         int64_t b_step, int64_t depth, float* c, int64_t c_row, bool accumulate) {
  Vec sum[kRows][2] = {};
  for (int64_t i = 0; i < depth; ++i, a += a_step, b += b_step) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(a[r * a_row]);
      sum[r][0] += x * b0;
      sum[r][1] += x * b1;
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

using ProductRows = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*,
                             int64_t, bool);

template <int... kRows>
static ProductRows product_rows_function(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr ProductRows kFunctions[] = {product_rows<kRows + 1>...};
  return kFunctions[rows - 1];
}

// A matrix whose element (r, i) is at data[r * row + i * step].
struct Matrix {
  const float* data;
  int64_t row, step;
};

// c[rows][columns] = a b (+ c), with b [depth][columns] and the rows cut into nearly equal parts.
static void product(const Matrix& a, const float* b, int64_t b_step, int64_t depth, float* c,
                    int64_t c_row, int64_t rows, int64_t columns, bool accumulate) {
  for (int64_t column = 0; column < columns; column += 2 * kLanes) {
    int64_t parts = (rows + kMaxMicroRows - 1) / kMaxMicroRows;
    for (int64_t r = 0; r < rows; --parts) {
      const int64_t count = (rows - r + parts - 1) / parts;
      const ProductRows function =
          product_rows_function(count, std::make_integer_sequence<int, kMaxMicroRows>());
      function(a.data + r * a.row, a.row, a.step, b + column, b_step, depth, c + r * c_row + column,
               c_row, accumulate);
      r += count;
    }
  }
}

struct PackedQueries {
  QueryTileHead head;
  float *q, *dout, *dq;

  PackedQueries(const TileShape& shape, std::byte* tile) : head(tile, shape.rows) {
    q = reinterpret_cast<float*>(tile + QueryTileHead::bytes(shape.rows));
    dout = q + shape.rows * padded_columns(shape.head_dim);
    dq = dout + shape.rows * padded_columns(shape.head_dim_v);
  }
  static int64_t bytes(const TileShape& shape) {
    return QueryTileHead::bytes(shape.rows) +
           shape.rows * (2 * padded_columns(shape.head_dim) + padded_columns(shape.head_dim_v)) * 4;
  }
};

struct BackwardScratch {
  float *k, *k_transposed, *v_transposed, *dk, *dv;
  float *p, *ds;  // [rows][32 keys]

  BackwardScratch(const TileShape& shape, std::byte* memory) {
    const int64_t k_size = kKeyTile * padded_columns(shape.head_dim);
    const int64_t v_size = kKeyTile * padded_columns(shape.head_dim_v);
    k = reinterpret_cast<float*>(memory);
    k_transposed = k + k_size;
    dk = k_transposed + k_size;
    v_transposed = dk + k_size;
    dv = v_transposed + v_size;
    p = dv + v_size;
    ds = p + shape.rows * kGranule;
  }
  static int64_t bytes(const TileShape& shape) {
    return (kKeyTile * (3 * padded_columns(shape.head_dim) + 2 * padded_columns(shape.head_dim_v)) +
            2 * shape.rows * kGranule) *
           4;
  }
};

template <class T>
static void pack_row(const void* source, int64_t dim, float* dest) {
  convert_row(static_cast<const T*>(source), dim, dest);
  std::fill(dest + dim, dest + padded_columns(dim), 0.0f);
}

// dest[dim][32 rows]
template <class T>
static void pack_transposed(const void* const* rows, int64_t dim, float* dest) {
  alignas(64) float block[kLanes][kMaxHeadDim];
  for (int first = 0; first < kGranule; first += kLanes) {
    for (int i = 0; i < kLanes; ++i) pack_row<T>(rows[first + i], dim, block[i]);
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(block[i] + d);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(dest + (d + i) * kGranule + first, x[i]);
    }
  }
}

template <class T>
static void pack_queries(const TileShape& shape, const void* const* q, const void* const* dout,
                         const void* const* out, std::byte* tile) {
  const PackedQueries packed(shape, tile);
  const int64_t dim = padded_columns(shape.head_dim), dim_v = padded_columns(shape.head_dim_v);
  float out_row[kMaxHeadDim];
  for (int64_t r = 0; r < shape.rows; ++r) {
    const float* dout_row = packed.dout + r * dim_v;
    pack_row<T>(q[r], shape.head_dim, packed.q + r * dim);
    pack_row<T>(dout[r], shape.head_dim_v, packed.dout + r * dim_v);
    pack_row<T>(out[r], shape.head_dim_v, out_row);
    Vec sum = {};
    for (int64_t d = 0; d < dim_v; d += kLanes) sum += load(out_row + d) * load(dout_row + d);
    packed.head.delta[r] = reduce_add(sum);
  }
}

template <class T>
static void pack_keys(const TileShape& shape, const void* const* k, const void* const* v,
                      std::byte* memory) {
  const BackwardScratch scratch(shape, memory);
  const int64_t dim = padded_columns(shape.head_dim), dim_v = padded_columns(shape.head_dim_v);
  for (int64_t j = 0; j < kKeyTile; ++j) pack_row<T>(k[j], shape.head_dim, scratch.k + j * dim);
  for (int64_t j = 0; j < kKeyTile; j += kGranule) {
    pack_transposed<T>(k + j, shape.head_dim, scratch.k_transposed + j * dim);
    pack_transposed<T>(v + j, shape.head_dim_v, scratch.v_transposed + j * dim_v);
  }
  std::fill(scratch.dk, scratch.dk + kKeyTile * dim, 0.0f);
  std::fill(scratch.dv, scratch.dv + kKeyTile * dim_v, 0.0f);
}

// Turns raw scores into p, and dp into ds, for one row of a granule.
static void gradient_row(const TileShape& shape, float lse, float delta, uint32_t visible, float* p,
                         float* ds) {
  constexpr float kBase2 = kLog2e;
  for (int j = 0; j < kGranule; j += kLanes) {
    const Vec s = load(p + j);
    Vec slope = broadcast(1.0f), logit = s * shape.scale - lse;
    if (shape.softcap > 0) {
      const Vec capped = tanh(s * (shape.scale / shape.softcap));
      slope -= capped * capped;
      logit = capped * shape.softcap - lse;
    }
    const Vec weights = exp2_nonpositive(keep_visible(logit, visible >> j) * kBase2);
    const Vec gradient = weights * (load(ds + j) - delta) * slope;
    store(p + j, weights);
    store(ds + j, weights == 0.0f ? Vec{} : gradient);
  }
}

static void add_pair(const TileShape& shape, const Visibility& visibility, bool first,
                     std::byte* tile, const std::byte* tile_ahead, std::byte* memory) {
  const PackedQueries queries(shape, tile);
  const BackwardScratch scratch(shape, memory);
  const int64_t dim = padded_columns(shape.head_dim), dim_v = padded_columns(shape.head_dim_v);
  if (first) std::fill(queries.dq, queries.dq + shape.rows * dim, 0.0f);
  Prefetch next_tile(tile_ahead, PackedQueries::bytes(shape));
  next_tile.spread_over(visibility.count * shape.rows);
  for (int n = 0; n < visibility.count; ++n) {
    const auto [granule, visible, seeing] = visibility.parts[n];
    const int64_t key = granule * kGranule, row = seeing.begin;
    const int64_t rows = std::min<int64_t>(seeing.end, shape.rows) - row;
    const float *q = queries.q + row * dim, *dout = queries.dout + row * dim_v;
    product({q, dim, 1}, scratch.k_transposed + key * dim, kGranule, shape.head_dim, scratch.p,
            kGranule, rows, kGranule, false);
    product({dout, dim_v, 1}, scratch.v_transposed + key * dim_v, kGranule, shape.head_dim_v,
            scratch.ds, kGranule, rows, kGranule, false);
    for (int64_t r = 0; r < rows; ++r) {
      next_tile.next();
      gradient_row(shape, queries.head.lse[row + r], queries.head.delta[row + r],
                   visible != nullptr ? visible[row + r] : ~uint32_t{0}, scratch.p + r * kGranule,
                   scratch.ds + r * kGranule);
    }
    product({scratch.p, 1, kGranule}, dout, dim_v, rows, scratch.dv + key * dim_v, dim_v, kGranule,
            dim_v, true);
    product({scratch.ds, 1, kGranule}, q, dim, rows, scratch.dk + key * dim, dim, kGranule, dim,
            true);
    product({scratch.ds, kGranule, 1}, scratch.k + key * dim, dim, kGranule, queries.dq + row * dim,
            dim, rows, dim, true);
  }
}

template <class T>
static void write_gradient_rows(const float* source, int64_t rows, int64_t dim, float factor,
                                void* dest) {
  T* row = static_cast<T*>(dest);
  for (int64_t r = 0; r < rows; ++r, row += dim, source += padded_columns(dim)) {
    for (int64_t d = 0; d < dim; ++d) from_float(source[d] * factor, row[d]);
  }
}

template <class T>
static void write_queries(const TileShape& shape, std::byte* tile, int64_t rows, void* dq) {
  write_gradient_rows<T>(PackedQueries(shape, tile).dq, rows, shape.head_dim, shape.scale, dq);
}

template <class T>
static void write_keys(const TileShape& shape, std::byte* memory, int64_t keys, void* dk,
                       void* dv) {
  const BackwardScratch scratch(shape, memory);
  write_gradient_rows<T>(scratch.dk, keys, shape.head_dim, shape.scale, dk);
  write_gradient_rows<T>(scratch.dv, keys, shape.head_dim_v, 1.0f, dv);
}

template <class T>
static const BackwardKernel& fma_backward_kernel() {
  static constexpr BackwardKernel kKernel = {kMaxBackwardRows,       PackedQueries::bytes,
                                             BackwardScratch::bytes, pack_queries<T>,
                                             pack_keys<T>,           add_pair,
                                             write_queries<T>,       write_keys<T>,
                                             enter_kernel,           leave_kernel};
  return kKernel;
}

static inline const BackwardKernel& fma_backward_kernel(DType dtype) {
  if (dtype == DType::kBFloat16) return fma_backward_kernel<BFloat16>();
  if (dtype == DType::kFloat16) return fma_backward_kernel<Float16>();
  return fma_backward_kernel<float>();
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
