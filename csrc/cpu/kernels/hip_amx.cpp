// Scores of HiP's candidates on AMX: 32 keys by 16 or 32 rows at once. Keys are left factors, which
// are loaded where they lie if 16 of them are evenly spaced, as those of one block are. The rows
// are right factors, packed once for a whole search.
#if defined(__x86_64__)
#include "cpu/kernels/amx_kernels.h"
#include "cpu/simd/standard_headers.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")

#define SPARSE_ATTN_ISA amx_hip
#define SPARSE_ATTN_VECTOR_BYTES 64
#include "cpu/simd/amx_tiles.h"

namespace sparse_attn::cpu {

namespace amx_hip {

// Groups of 16 rows: an even number, or one.
int64_t num_groups(int64_t num_rows) { return num_rows <= 16 ? 1 : (num_rows + 31) / 32 * 2; }

// The rows, then their origins.
int64_t query_bytes(int64_t num_rows, int64_t head_dim) {
  return num_groups(num_rows) * 16 * (padded_dim(head_dim) * 2 + 4);
}

// The last row is repeated, which no maximum notices.
void prepare_queries(const void* const* rows, int64_t num_rows, int64_t head_dim,
                     std::byte* queries) {
  uint16_t* tile = reinterpret_cast<uint16_t*>(queries);
  for (int64_t g = 0; g < num_groups(num_rows); ++g) {
    const void* group[16];
    for (int64_t i = 0; i < 16; ++i) group[i] = rows[std::min(16 * g + i, num_rows - 1)];
    for (int64_t d = 0; d < head_dim; d += 32, tile += kTile) {
      pack_right_transposed(group, d, head_dim, tile);
    }
  }
  std::memset(tile, 0, num_groups(num_rows) * 64);
}

// 16 keys as left factors: where the first tile lies, and how far apart its rows and the tiles are.
struct Keys {
  const std::byte* first;
  int64_t row_bytes, tile_bytes;

  Keys(const std::byte* first, int64_t row_bytes)
      : first(first), row_bytes(row_bytes), tile_bytes(64) {}

  Keys(const void* const* rows, int64_t head_dim, uint16_t* copy)
      : first(static_cast<const std::byte*>(rows[0])),
        row_bytes(static_cast<const std::byte*>(rows[1]) - first),
        tile_bytes(64) {
    bool even = head_dim % 32 == 0;
    for (int64_t i = 2; i < 16; ++i) even = even && rows[i] == first + i * row_bytes;
    if (even) return;
    first = reinterpret_cast<const std::byte*>(copy);
    row_bytes = 64;
    tile_bytes = kTile * 2;
    for (int64_t d = 0; d < head_dim; d += 32, copy += kTile) pack_left(rows, d, head_dim, copy);
  }
};

// 16 sampled rows as right factors, and their origins.
struct Rows {
  const uint16_t* tiles = nullptr;
  const float* origins = nullptr;

  Rows() = default;

  // Group g of the rows that a search has prepared.
  Rows(const std::byte* prepared, int64_t groups, int64_t steps, int64_t g)
      : tiles(reinterpret_cast<const uint16_t*>(prepared) + g * steps * kTile),
        origins(reinterpret_cast<const float*>(prepared + groups * steps * kTile * 2) + 16 * g) {}

  __m512 origin() const { return _mm512_load_ps(origins); }
};

// scores[32 keys][16 rows].
void multiply(const Keys& a, const Keys& b, const Rows& rows, int64_t steps, float* scores) {
  fence_compiler();
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, a.first + i * a.tile_bytes, a.row_bytes);
    _tile_loadd(5, b.first + i * b.tile_bytes, b.row_bytes);
    _tile_loadd(6, rows.tiles + i * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + kFloatTile, 64);
  fence_compiler();
}

// scores[2][32 keys][16 rows].
void multiply(const Keys& a, const Keys& b, const Rows& rows, const Rows& more, int64_t steps,
              float* scores) {
  fence_compiler();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, a.first + i * a.tile_bytes, a.row_bytes);
    _tile_loadd(5, b.first + i * b.tile_bytes, b.row_bytes);
    _tile_loadd(6, rows.tiles + i * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, more.tiles + i * kTile, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + kFloatTile, 64);
  _tile_stored(2, scores + 2 * kFloatTile, 64);
  _tile_stored(3, scores + 3 * kFloatTile, 64);
  fence_compiler();
}

// The largest lane of each of 16 vectors.
__m512 max_across(const __m512* x) {
  __m512i y[16];
  for (int i = 0; i < 16; ++i) y[i] = _mm512_castps_si512(x[i]);
  transpose_16x16(y);
  __m512 top = _mm512_castsi512_ps(y[0]);
  for (int i = 1; i < 16; ++i) top = _mm512_max_ps(top, _mm512_castsi512_ps(y[i]));
  return top;
}

void prefetch(const void* const* keys, int64_t head_dim) {
  for (int64_t i = 0; i < 32; ++i) {
    for (int64_t d = 0; d < head_dim; d += 32) {
      __builtin_prefetch(static_cast<const uint16_t*>(keys[i]) + d);
    }
  }
}

void score(const std::byte* prepared, int64_t num_rows, int64_t head_dim, const void* const* keys,
           int64_t count, float* best) {
  constexpr int64_t kMostSteps = 256 / 32;
  alignas(64) uint16_t copies[2][kMostSteps * kTile];
  alignas(64) float scores[4 * kFloatTile];
  const int64_t steps = padded_dim(head_dim) / 32, groups = num_groups(num_rows);
  prefetch(keys, head_dim);
  for (int64_t j = 0; j < count; j += 32) {
    if (j + 32 < count) prefetch(keys + j + 32, head_dim);
    const Keys a(keys + j, head_dim, copies[0]), b(keys + j + 16, head_dim, copies[1]);
    __m512 top[32];
    for (__m512& x : top) x = _mm512_set1_ps(-__builtin_inff());
    for (int64_t g = 0; g < groups; g += 2) {
      const Rows rows(prepared, groups, steps, g);
      const Rows more(prepared, groups, steps, std::min(g + 1, groups - 1));
      if (groups == 1) {
        multiply(a, b, rows, steps, scores);
      } else {
        multiply(a, b, rows, more, steps, scores);
      }
      const __m512 origin = rows.origin(), other = more.origin();
      for (int64_t i = 0; i < 32; ++i) {
        const float* score = scores + 16 * i;
        top[i] = _mm512_max_ps(_mm512_load_ps(score) - origin, top[i]);
        if (groups == 1) continue;
        top[i] = _mm512_max_ps(_mm512_load_ps(score + 2 * kFloatTile) - other, top[i]);
      }
    }
    _mm512_storeu_ps(best + j, max_across(top));
    _mm512_storeu_ps(best + j + 16, max_across(top + 16));
  }
}

// The greatest lanes of a tile.
__m512 max_of_tile(const float* tile) {
  __m512 top[4];
  for (__m512& x : top) x = _mm512_set1_ps(-__builtin_inff());
  for (int64_t i = 0; i < 16; ++i)
    top[i % 4] = _mm512_max_ps(_mm512_load_ps(tile + 16 * i), top[i % 4]);
  return _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
}

void set_origins(std::byte* prepared, int64_t num_rows, int64_t head_dim, const void* const* keys,
                 int64_t count) {
  constexpr int64_t kMostSteps = 256 / 32;
  alignas(64) uint16_t copies[2][kMostSteps * kTile];
  alignas(64) float scores[2 * kFloatTile];
  const int64_t steps = padded_dim(head_dim) / 32, groups = num_groups(num_rows);
  for (int64_t g = 0; g < groups; ++g) {
    const Rows rows(prepared, groups, steps, g);
    __m512 top = _mm512_set1_ps(-__builtin_inff());
    for (int64_t j = 0; j < count; j += 32) {
      const Keys a(keys + j, head_dim, copies[0]), b(keys + j + 16, head_dim, copies[1]);
      multiply(a, b, rows, steps, scores);
      top = _mm512_max_ps(max_of_tile(scores), top);
      top = _mm512_max_ps(max_of_tile(scores + kFloatTile), top);
    }
    const __mmask16 finite =
        _mm512_cmp_ps_mask(_mm512_abs_ps(top), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    _mm512_store_ps(const_cast<float*>(rows.origins), _mm512_maskz_mov_ps(finite, top));
  }
}

// Some rows of two runs, which are fetched a step of the products at a time.
struct Ahead {
  const std::byte* const* runs;
  int64_t first_row, last_row, row_bytes;

  void fetch(int64_t step) const {
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t r = first_row; r < last_row; ++r) {
        __builtin_prefetch(runs[i] + r * row_bytes + 64 * step);
      }
    }
  }
};

// Two runs times two groups of 16 rows, in tiles 0 to 3. What these held before goes to `held`: a
// tile is stored while the next products are made, for which one would otherwise wait.
void multiply(const std::byte* const* runs, int64_t row_bytes, const Rows& rows, const Rows& more,
              int64_t steps, const Ahead& ahead, float* held) {
  fence_compiler();
  _tile_loadd(4, runs[0], row_bytes);
  _tile_loadd(6, rows.tiles, 64);
  _tile_stored(0, held, 64);
  _tile_zero(0);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, runs[1], row_bytes);
  _tile_stored(1, held + kFloatTile, 64);
  _tile_zero(1);
  _tile_dpbf16ps(1, 5, 6);
  _tile_loadd(7, more.tiles, 64);
  _tile_stored(2, held + 2 * kFloatTile, 64);
  _tile_zero(2);
  _tile_dpbf16ps(2, 4, 7);
  _tile_stored(3, held + 3 * kFloatTile, 64);
  _tile_zero(3);
  _tile_dpbf16ps(3, 5, 7);
  ahead.fetch(0);
  for (int64_t i = 1; i < steps; ++i) {
    _tile_loadd(4, runs[0] + 64 * i, row_bytes);
    _tile_loadd(6, rows.tiles + i * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, runs[1] + 64 * i, row_bytes);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, more.tiles + i * kTile, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    ahead.fetch(i);
  }
  fence_compiler();
}

// Four runs times 16 rows, likewise. Each run is read once, so fetching it ahead gains nothing.
void multiply(const std::byte* const* runs, int64_t row_bytes, const Rows& rows, int64_t steps,
              float* held) {
  fence_compiler();
  _tile_loadd(6, rows.tiles, 64);
  _tile_loadd(4, runs[0], row_bytes);
  _tile_stored(0, held, 64);
  _tile_zero(0);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, runs[1], row_bytes);
  _tile_stored(1, held + kFloatTile, 64);
  _tile_zero(1);
  _tile_dpbf16ps(1, 5, 6);
  _tile_loadd(4, runs[2], row_bytes);
  _tile_stored(2, held + 2 * kFloatTile, 64);
  _tile_zero(2);
  _tile_dpbf16ps(2, 4, 6);
  _tile_loadd(5, runs[3], row_bytes);
  _tile_stored(3, held + 3 * kFloatTile, 64);
  _tile_zero(3);
  _tile_dpbf16ps(3, 5, 6);
  for (int64_t i = 1; i < steps; ++i) {
    _tile_loadd(6, rows.tiles + i * kTile, 64);
    _tile_loadd(4, runs[0] + 64 * i, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, runs[1] + 64 * i, row_bytes);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, runs[2] + 64 * i, row_bytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, runs[3] + 64 * i, row_bytes);
    _tile_dpbf16ps(3, 5, 6);
  }
  fence_compiler();
}

void store_products(float* held) {
  fence_compiler();
  _tile_stored(0, held, 64);
  _tile_stored(1, held + kFloatTile, 64);
  _tile_stored(2, held + 2 * kFloatTile, 64);
  _tile_stored(3, held + 3 * kFloatTile, 64);
  fence_compiler();
}

// Where the greatest products of each row belong that the four tiles hold.
struct Held {
  const Rows* rows[4];
  __m512* tops[4] = {};

  void raise(const float* held) const {
    if (tops[0] == nullptr) return;
    for (int i = 0; i < 4; ++i) *tops[i] = max_of_tile(held + i * kFloatTile) - rows[i]->origin();
  }
};

// Sixteen runs at a time, two of them times the rows of two searches at once (or 32 rows of one),
// or four times 16 rows if there are no more. The greatest products of each row are taken while the
// next products are made.
void score_runs(const std::byte* const* queries, int64_t num_searches, int64_t num_rows,
                int64_t head_dim, const std::byte* const* runs, int64_t count, int64_t row_bytes,
                float* const* best) {
  constexpr int64_t kRuns = 16, kMostTogether = 8, kCachedRows = 24 << 10;  // bytes
  const int64_t steps = head_dim / 32, groups = num_groups(num_rows), all = num_searches * groups;
  const int64_t together =
      std::clamp<int64_t>(kCachedRows / (steps * kTile * 2), 2, kMostTogether) & ~1;
  for (int64_t i = 0; i < num_searches; ++i) std::fill_n(best[i], count, -__builtin_inff());
  alignas(64) float held[4 * kFloatTile];
  __m512 tops[kMostTogether][kRuns];
  Rows rows[kMostTogether];
  for (int64_t first = 0; first < all; first += together) {
    const int64_t num = std::min(together, all - first), wide = num == 1 ? 4 : 2;  // runs at once
    for (int64_t t = 0; t < together; ++t) {
      const int64_t i = first + std::min(t, num - 1);
      rows[t] = Rows(queries[i / groups], groups, steps, i % groups);
    }
    for (int64_t j = 0; j < count; j += kRuns) {
      const int64_t num_runs = std::min(kRuns, count - j);
      const std::byte* batch[kRuns + 2];
      for (int64_t r = 0; r < kRuns + 2; ++r) batch[r] = runs[std::min(j + r, count - 1)];
      Held before;
      for (int64_t r = 0; r < num_runs; r += wide) {
        for (int64_t t = 0; t < num; t += 2) {
          Held now;
          for (int i = 0; i < 4; ++i) {
            const int64_t row = wide == 4 ? 0 : t + i / 2, run = wide == 4 ? r + i : r + i % 2;
            now.rows[i] = &rows[row];
            now.tops[i] = &tops[row][run];
          }
          if (wide == 4) {
            multiply(batch + r, row_bytes, rows[0], steps, held);
          } else {
            const Ahead ahead{batch + r + 2, kHipRun * t / num,
                              std::min(kHipRun * (t + 2) / num, kHipRun), row_bytes};
            multiply(batch + r, row_bytes, rows[t], rows[t + 1], steps, ahead, held);
          }
          before.raise(held);
          before = now;
        }
      }
      store_products(held);
      before.raise(held);
      const __mmask16 inside = static_cast<__mmask16>((1u << num_runs) - 1);
      for (int64_t t = 0; t < num; ++t) {
        float* scores = best[(first + t) / groups] + j;
        const __m512 raised =
            _mm512_max_ps(max_across(tops[t]), _mm512_maskz_loadu_ps(inside, scores));
        _mm512_mask_storeu_ps(scores, inside, raised);
      }
    }
  }
}

}  // namespace amx_hip

constinit const HipKernel kAmxHipOfRows = {
    .query_bytes = amx_hip::query_bytes,
    .prepare_queries = amx_hip::prepare_queries,
    .set_origins = amx_hip::set_origins,
    .score = amx_hip::score,
    .score_runs = amx_hip::score_runs,
    .enter = amx_hip::enter_kernel,
    .leave = amx_hip::leave_kernel,
};

}  // namespace sparse_attn::cpu
#endif
