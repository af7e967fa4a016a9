// The bfloat16 gradient kernel on AMX. p and ds are rounded to bfloat16 before they are multiplied;
// all sums are float32.
//
// dk and dv are kept transposed, so that p and ds are right factors as they come, row by row:
// dv^T += dout^T p, dk^T += q^T ds. Dims are rounded up to 32 with zeros.
#if defined(__x86_64__)
#include "cpu/kernels/amx_kernels.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/standard_headers.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")

#define SPARSE_ATTN_ISA amx_backward
#define SPARSE_ATTN_VECTOR_BYTES 64
#include "cpu/simd/amx_tiles.h"

namespace sparse_attn::cpu {

namespace amx_backward {

constexpr double kLog2e = 1.4426950408889634;

// Tiles of a query tile; each pair of letters is (tiles down, tiles across).
struct PackedQueries {
  QueryTileHead head;
  float* dq;               // (rows / 16, dim / 16)
  uint16_t *q, *dout;      // left factors (rows / 16, dim / 32)
  uint16_t *q_t, *dout_t;  // transposed left factors (dim / 16, rows / 32)

  PackedQueries(const TileShape& shape, std::byte* tile) : head(tile, shape.rows) {
    const int64_t size = shape.rows * padded_dim(shape.head_dim);
    const int64_t size_v = shape.rows * padded_dim(shape.head_dim_v);
    dq = reinterpret_cast<float*>(tile + QueryTileHead::bytes(shape.rows));
    q = reinterpret_cast<uint16_t*>(dq + size);
    q_t = q + size;
    dout = q_t + size;
    dout_t = dout + size_v;
  }
  static int64_t bytes(const TileShape& shape) {
    return QueryTileHead::bytes(shape.rows) +
           shape.rows * (8 * padded_dim(shape.head_dim) + 4 * padded_dim(shape.head_dim_v));
  }
};

// Each granule has its own k_t, v_t, k, dk_t, dv_t, of `k_size` or `v_size` elements.
struct Scratch {
  int64_t k_size, v_size;
  float *dk_t, *dv_t;   // transposed results (dim / 16, 2)
  uint16_t *k_t, *v_t;  // transposed right factors: for either half of the keys, (dim / 32, 1)
  uint16_t* k;          // right factor (1, dim / 16)
  float *s, *dp;        // results (rows / 16, 2), of one granule
  uint16_t *p, *ds;     // right factors (rows / 32, 2), of one granule
  uint16_t* ds_left;    // left factor (rows / 16, granules)

  Scratch(const TileShape& shape, std::byte* memory)
      : k_size(kGranule * padded_dim(shape.head_dim)),
        v_size(kGranule * padded_dim(shape.head_dim_v)) {
    const int64_t step = shape.rows * kGranule;
    dk_t = reinterpret_cast<float*>(memory);
    dv_t = dk_t + kKeyTileGranules * k_size;
    s = dv_t + kKeyTileGranules * v_size;
    dp = s + step;
    k_t = reinterpret_cast<uint16_t*>(dp + step);
    k = k_t + kKeyTileGranules * k_size;
    v_t = k + kKeyTileGranules * k_size;
    p = v_t + kKeyTileGranules * v_size;
    ds = p + step;
    ds_left = ds + step;
  }
  static int64_t bytes(const TileShape& shape) {
    return kKeyTile * (8 * padded_dim(shape.head_dim) + 6 * padded_dim(shape.head_dim_v)) +
           shape.rows * (12 * kGranule + 2 * kKeyTile);
  }
};

void pack_query_forms(const void* const* rows, int64_t num_rows, int64_t dim, uint16_t* left,
                      uint16_t* transposed) {
  const int64_t padded = padded_dim(dim);
  for (int64_t r = 0; r < num_rows; r += 16) {
    for (int64_t d = 0; d < padded; d += 32, left += kTile) pack_left(rows + r, d, dim, left);
  }
  for (int64_t d = 0; d < padded; d += 16) {
    for (int64_t r = 0; r < num_rows; r += 32, transposed += kTile) {
      pack_left_transposed(rows + r, d, dim, transposed);
    }
  }
}

float dot_row(const void* a, const void* b, int64_t dim) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += 16) {
    const __mmask16 mask = static_cast<__mmask16>(lanes_within(d, dim));
    const auto load_floats = [&](const void* row) {
      const __m256i x = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + d);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    };
    sum = _mm512_fmadd_ps(load_floats(a), load_floats(b), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

void pack_queries(const TileShape& shape, const void* const* q, const void* const* dout,
                  const void* const* out, std::byte* tile) {
  const PackedQueries packed(shape, tile);
  pack_query_forms(q, shape.rows, shape.head_dim, packed.q, packed.q_t);
  pack_query_forms(dout, shape.rows, shape.head_dim_v, packed.dout, packed.dout_t);
  for (int64_t r = 0; r < shape.rows; ++r) {
    packed.head.delta[r] = dot_row(dout[r], out[r], shape.head_dim_v);
  }
}

void pack_transposed(const void* const* rows, int64_t dim, uint16_t* dest) {
  for (int64_t j = 0; j < kKeyTile; j += 16) {
    for (int64_t d = 0; d < dim; d += 32, dest += kTile) {
      pack_right_transposed(rows + j, d, dim, dest);
    }
  }
}

void pack_keys(const TileShape& shape, const void* const* k, const void* const* v,
               std::byte* memory) {
  const Scratch scratch(shape, memory);
  pack_transposed(k, shape.head_dim, scratch.k_t);
  pack_transposed(v, shape.head_dim_v, scratch.v_t);
  uint16_t* dest = scratch.k;
  for (int64_t j = 0; j < kKeyTile; j += kGranule) {
    for (int64_t d = 0; d < padded_dim(shape.head_dim); d += 16, dest += kTile) {
      pack_right(k + j, d, shape.head_dim, dest);
    }
  }
  std::fill(scratch.dk_t, scratch.dk_t + kKeyTileGranules * scratch.k_size, 0.0f);
  std::fill(scratch.dv_t, scratch.dv_t + kKeyTileGranules * scratch.v_size, 0.0f);
}

// A block of 2 x 2 tiles; `below` floats lie between its two rows of tiles.
inline TileSums::Place block_place(float* c, int64_t below) { return {c, 16, kFloatTile, below}; }

// Adds the product of two left tiles, one below the other, and two right tiles, side by side.
// Every call fetches some of the next query tile.
inline void multiply_block(const uint16_t* left0, const uint16_t* left1, const uint16_t* right0,
                           const uint16_t* right1, TileSums& sums, Prefetch& next_tile) {
  next_tile.next();
  _tile_loadd(4, left0, 64);
  _tile_loadd(6, right0, 64);
  _tile_loadd(7, right1, 64);
  _tile_loadd(5, left1, 64);
  sums.add();
}

// Whole blocks of 32 rows that hold all rows of the range.
RowRange whole_blocks(const RowRange& range, int64_t rows) {
  const int end = std::min(range.end, static_cast<int>(rows));
  return {range.begin / 32 * 32, (end + 31) / 32 * 32};
}

// c[rows][32 keys] = a[rows][dim] b[32 keys][dim]^T for the rows of a range.
void multiply_rows_by_keys(const uint16_t* a, const uint16_t* b, const RowRange& range, int64_t dim,
                           float* c, TileSums& sums, Prefetch& next_tile) {
  for (int64_t r = range.begin; r < range.end; r += 32) {
    const uint16_t* left = a + r * dim;
    sums.start(block_place(c + r / 16 * 2 * kFloatTile, 2 * kFloatTile), true);
    for (int64_t d = 0; d < dim; d += 32) {
      multiply_block(left + d * 16, left + (dim + d) * 16, b + d * 16, b + (dim + d) * 16, sums,
                     next_tile);
    }
  }
}

// c[dim][32 keys] += a[rows][dim]^T b[rows][32 keys], summed over the rows of a range.
void multiply_into_keys(const uint16_t* a_t, const uint16_t* b, const RowRange& range, int64_t rows,
                        int64_t dim, float* c, TileSums& sums, Prefetch& next_tile) {
  for (int64_t d = 0; d < dim; d += 32, a_t += 32 * rows, c += 4 * kFloatTile) {
    sums.start(block_place(c, 2 * kFloatTile), false);
    for (int64_t r = range.begin; r < range.end; r += 32) {
      multiply_block(a_t + r * 16, a_t + (rows + r) * 16, b + r * 32, b + r * 32 + kTile, sums,
                     next_tile);
    }
  }
}

// dq[rows][dim] += ds[rows][keys] k[keys][dim] over all granules of a pair.
void multiply_into_queries(const Scratch& scratch, const Visibility& visibility, int64_t rows,
                           int64_t dim, bool first, float* dq, TileSums& sums,
                           Prefetch& next_tile) {
  const int64_t below = dim * 16, left_below = visibility.count * kTile;
  for (int64_t d = 0; d < dim; d += 32) {
    for (int64_t r = 0; r < rows; r += 32) {
      const uint16_t* left = scratch.ds_left + r / 16 * left_below;
      sums.start(block_place(dq + r * dim + d * 16, below), first);
      for (int n = 0; n < visibility.count; ++n, left += kTile) {
        if (!visibility.parts[n].rows.meets(r, 32)) continue;
        const uint16_t* k = scratch.k + visibility.parts[n].granule * scratch.k_size + d * 32;
        multiply_block(left, left + left_below, k, k + kTile, sums, next_tile);
      }
      sums.finish();
    }
  }
}

// Two rows rounded to bfloat16, element by element side by side.
inline __m512i interleave(__m512 even, __m512 odd) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder),
                                  (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

struct Gradients {
  __m512 p, ds;
};

// What is added to the scores of 16 keys, and sums over rows for its gradient.
struct BiasLanes {
  Vec bias, offset, dbias = {}, dslope = {};
};

template <bool kSoftcap, bool kBiased>
inline Gradients gradients(const TileShape& shape, __m512 s, __m512 dp, float lse, float delta,
                           __mmask16 visible, float row, float alibi_slope, BiasLanes& lanes) {
  const __m512 offset = _mm512_set1_ps(lse * static_cast<float>(kLog2e)),
               base = _mm512_set1_ps(delta);
  constexpr float kBase2 = kLog2e;
  __m512 x, slope;
  Vec distance, term;
  if constexpr (kBiased) {
    distance = absolute(row - lanes.offset);
    term = lanes.bias - alibi_slope * distance;
  }
  if constexpr (kSoftcap) {
    const Vec capped = tanh((Vec)s * (shape.scale / shape.softcap));
    x = (__m512)(capped * static_cast<float>(shape.softcap * kLog2e)) - offset;
    if constexpr (kBiased) x = (__m512)((capped * shape.softcap + term - lse) * kBase2);
    slope = (__m512)(1.0f - capped * capped);
  } else {
    x = _mm512_fmsub_ps(s, _mm512_set1_ps(static_cast<float>(shape.scale * kLog2e)), offset);
    if constexpr (kBiased) x = (__m512)(((Vec)s * shape.scale + term - lse) * kBase2);
  }
  Gradients result;
  result.p = exp2_bf16(x, visible);
  result.ds = _mm512_maskz_mul_ps(visible, result.p, _mm512_sub_ps(dp, base));
  if constexpr (kBiased) {
    lanes.dbias += (Vec)result.ds;
    lanes.dslope -= (Vec)result.ds * distance;
  }
  if constexpr (kSoftcap) result.ds = _mm512_maskz_mul_ps(visible, result.ds, slope);
  return result;
}

// Turns the scores and dp of one granule into p and ds; `n` is its place among the pair's granules.
// The bias of the key tile is null unless kBiased.
template <bool kSoftcap, bool kBiased>
void gradient_step(const TileShape& shape, const QueryTileHead& head, const Scratch& scratch,
                   const Visibility& visibility, int n, const RowRange& range, KeyTileBias* bias) {
  const uint32_t* words = visibility.parts[n].visible;
  const int key = visibility.parts[n].granule * kGranule;
  BiasLanes lanes[2];
  const float alibi_slope = kBiased ? bias->terms.slope : 0.0f;
  for (int half = 0; kBiased && half < 2; ++half) {
    lanes[half].bias = load(bias->terms.bias + key + half * 16);
    lanes[half].offset = load(bias->terms.offset + key + half * 16);
  }
  for (int64_t r = range.begin; r < range.end; r += 2) {
    const int64_t at = r / 16 * 2 * kFloatTile + r % 16 * 16;
    const int64_t pair = r / 32 * 2 * kTile + r % 32 * 16;
    uint16_t* left = scratch.ds_left + (r / 16 * visibility.count + n) * kTile + r % 16 * kGranule;
    const uint32_t even = words != nullptr ? words[r] : ~uint32_t{0};
    const uint32_t odd = words != nullptr ? words[r + 1] : ~uint32_t{0};
    Gradients x[2][2];
    for (int half = 0; half < 2; ++half) {
      const float* s = scratch.s + at + half * kFloatTile;
      const float* dp = scratch.dp + at + half * kFloatTile;
      const uint32_t bits[2] = {even, odd};
      for (int i = 0; i < 2; ++i) {
        x[half][i] = gradients<kSoftcap, kBiased>(
            shape, _mm512_load_ps(s + i * 16), _mm512_load_ps(dp + i * 16), head.lse[r + i],
            head.delta[r + i], static_cast<__mmask16>(bits[i] >> half * 16),
            static_cast<float>(r + i), alibi_slope, lanes[half]);
      }
      _mm512_store_si512(scratch.p + pair + half * kTile, interleave(x[half][0].p, x[half][1].p));
      _mm512_store_si512(scratch.ds + pair + half * kTile,
                         interleave(x[half][0].ds, x[half][1].ds));
    }
    for (int i = 0; i < 2; ++i) {
      _mm512_store_si512(left + i * kGranule, (__m512i)_mm512_cvtne2ps_pbh(x[1][i].ds, x[0][i].ds));
    }
  }
  for (int j = 0; kBiased && j < kGranule; ++j) {
    bias->dbias[key + j] += lanes[j / 16].dbias[j % 16];
    bias->dslope += lanes[j / 16].dslope[j % 16];
  }
}

template <bool kSoftcap>
constexpr auto kGradientStep =
    std::array{gradient_step<kSoftcap, false>, gradient_step<kSoftcap, true>};

void add_pair(const TileShape& shape, const Visibility& visibility, bool first, std::byte* tile,
              const std::byte* tile_ahead, KeyTileBias* bias, std::byte* memory) {
  const PackedQueries queries(shape, tile);
  const Scratch scratch(shape, memory);
  const int64_t rows = shape.rows;
  const int64_t dim = padded_dim(shape.head_dim), dim_v = padded_dim(shape.head_dim_v);
  Prefetch next_tile(tile_ahead, PackedQueries::bytes(shape));
  next_tile.spread_over(visibility.count * (rows / 32) * (3 * dim + 2 * dim_v) / 32);
  TileSums sums;
  for (int n = 0; n < visibility.count; ++n) {
    const int64_t granule = visibility.parts[n].granule;
    const int64_t k = granule * scratch.k_size, v = granule * scratch.v_size;
    const RowRange range = whole_blocks(visibility.parts[n].rows, rows);
    fence_compiler();
    multiply_rows_by_keys(queries.q, scratch.k_t + k, range, dim, scratch.s, sums, next_tile);
    multiply_rows_by_keys(queries.dout, scratch.v_t + v, range, dim_v, scratch.dp, sums, next_tile);
    sums.store();
    fence_compiler();
    const auto& steps = shape.softcap > 0 ? kGradientStep<true> : kGradientStep<false>;
    steps[bias != nullptr](shape, queries.head, scratch, visibility, n, range, bias);
    fence_compiler();
    multiply_into_keys(queries.dout_t, scratch.p, range, rows, dim_v, scratch.dv_t + v, sums,
                       next_tile);
    multiply_into_keys(queries.q_t, scratch.ds, range, rows, dim, scratch.dk_t + k, sums,
                       next_tile);
  }
  multiply_into_queries(scratch, visibility, rows, dim, first, queries.dq, sums, next_tile);
  sums.store();
  fence_compiler();
}

inline void write_vector(__m512 x, int64_t d, int64_t dim, uint16_t* row) {
  _mm256_mask_storeu_epi16(row + d, static_cast<__mmask16>(lanes_within(d, dim)),
                           (__m256i)_mm512_cvtneps_pbh(x));
}

void write_queries(const TileShape& shape, std::byte* tile, int64_t rows, void* dq) {
  const PackedQueries queries(shape, tile);
  const int64_t dim = shape.head_dim;
  const __m512 factor = _mm512_set1_ps(shape.scale);
  for (int64_t r = 0; r < rows; ++r) {
    const float* source = queries.dq + r / 16 * 16 * padded_dim(dim) + r % 16 * 16;
    uint16_t* row = static_cast<uint16_t*>(dq) + r * dim;
    for (int64_t d = 0; d < dim; d += 16, source += kFloatTile) {
      write_vector(_mm512_mul_ps(_mm512_load_ps(source), factor), d, dim, row);
    }
  }
}

void write_transposed(const float* source, int64_t keys, int64_t dim, float scale, void* dest) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t j = 0; j < keys; j += kGranule) {
    for (int64_t d = 0; d < padded_dim(dim); d += 16) {
      for (int64_t half = 0; half < 2; ++half, source += kFloatTile) {
        __m512i x[16];
        for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(source + i * 16);
        transpose_16x16(x);
        for (int64_t i = 0; i < std::min<int64_t>(16, keys - j - half * 16); ++i) {
          write_vector(_mm512_mul_ps(_mm512_castsi512_ps(x[i]), factor), d, dim,
                       static_cast<uint16_t*>(dest) + (j + half * 16 + i) * dim);
        }
      }
    }
  }
}

void write_keys(const TileShape& shape, std::byte* memory, int64_t keys, void* dk, void* dv) {
  const Scratch scratch(shape, memory);
  write_transposed(scratch.dk_t, keys, shape.head_dim, shape.scale, dk);
  write_transposed(scratch.dv_t, keys, shape.head_dim_v, 1.0f, dv);
}

}  // namespace amx_backward

constinit const BackwardKernel kAmxBackward = {
    .max_rows = kMaxRows,
    .query_tile_bytes = amx_backward::PackedQueries::bytes,
    .scratch_bytes = amx_backward::Scratch::bytes,
    .pack_queries = amx_backward::pack_queries,
    .pack_keys = amx_backward::pack_keys,
    .add_pair = amx_backward::add_pair,
    .write_queries = amx_backward::write_queries,
    .write_keys = amx_backward::write_keys,
    .enter = amx_backward::enter_kernel,
    .leave = amx_backward::leave_kernel,
};

}  // namespace sparse_attn::cpu
#endif
