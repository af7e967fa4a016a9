// Scores of HiP's candidates on AMX: 32 keys by 16 or 32 rows at once. Keys are left factors, which
// are loaded where they lie if 16 of them are evenly spaced, as those of one block are. The rows
// are right factors, packed once for a whole search.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "hip.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")

#define SPARSE_ATTN_ISA amx_hip
#define SPARSE_ATTN_VECTOR_BYTES 64
#include "amx_tiles.h"

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
  const uint16_t* tiles;
  const float* origins;

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

void prefetch_run(const std::byte* run, int64_t row_bytes, int64_t steps) {
  for (int64_t i = 0; i < kHipRun; ++i) {
    for (int64_t d = 0; d < steps; ++d) __builtin_prefetch(run + i * row_bytes + 64 * d);
  }
}

// The products of two runs with one or two groups of rows, and the scores that they raise.
struct RunScores {
  alignas(64) float tiles[4 * kFloatTile];
  const float* origins[2];
  float* best[4];
  int count = 0;  // of tiles

  void raise() const {
    for (int i = 0; i < count; ++i) {
      const __m512 top = max_of_tile(tiles + i * kFloatTile) - _mm512_load_ps(origins[i / 2]);
      *best[i] = std::max(*best[i], _mm512_reduce_max_ps(top));
    }
  }
};

// Two runs times the rows of two searches at once, or 32 rows of one. Scores are raised while the
// next products are made.
void score_runs(const std::byte* const* queries, int64_t num_searches, int64_t num_rows,
                int64_t head_dim, const std::byte* const* runs, int64_t count, int64_t row_bytes,
                float* const* best) {
  constexpr int64_t kCachedRows = 24 << 10;  // bytes
  const int64_t steps = head_dim / 32, groups = num_groups(num_rows);
  const int64_t together = std::max<int64_t>(2, kCachedRows / (groups * steps * kTile * 2)) & ~1;
  for (int64_t i = 0; i < num_searches; ++i) std::fill_n(best[i], count, -__builtin_inff());
  RunScores scores[2];
  int turn = 0;
  for (int64_t first = 0; first < num_searches; first += together) {
    const int64_t last = std::min(first + together, num_searches);
    for (int64_t j = 0; j < count; j += 2) {
      const int64_t other = std::min(j + 1, count - 1);
      const Keys a(runs[j], row_bytes), b(runs[other], row_bytes);
      for (int64_t next = j + 2; next < std::min(j + 4, count); ++next) {
        prefetch_run(runs[next], row_bytes, steps);
      }
      const auto score = [&](int64_t i, int64_t g, int64_t more_i, int64_t more_g) {
        RunScores& now = scores[turn];
        const Rows rows(queries[i], groups, steps, g);
        now.origins[0] = rows.origins;
        now.best[0] = best[i] + j;
        now.best[1] = best[i] + other;
        if (more_i < last) {
          const Rows more(queries[more_i], groups, steps, more_g);
          now.origins[1] = more.origins;
          now.best[2] = best[more_i] + j;
          now.best[3] = best[more_i] + other;
          now.count = 4;
          multiply(a, b, rows, more, steps, now.tiles);
        } else {
          now.count = 2;
          multiply(a, b, rows, steps, now.tiles);
        }
        turn = 1 - turn;
        scores[turn].raise();
        scores[turn].count = 0;
      };
      if (groups == 1) {
        for (int64_t i = first; i < last; i += 2) score(i, 0, i + 1, 0);
      } else {
        for (int64_t i = first; i < last; ++i) {
          for (int64_t g = 0; g < groups; g += 2) score(i, g, i, g + 1);
        }
      }
    }
  }
  scores[1 - turn].raise();
}

}  // namespace amx_hip

const HipKernel& amx_hip_kernel() {
  static const HipKernel kKernel = {
      amx_hip::query_bytes,     avx512_hip_kernel(DType::kBFloat16).mean,
      amx_hip::prepare_queries, amx_hip::set_origins,
      amx_hip::score,           amx_hip::score_runs,
      amx_hip::enter_kernel,    amx_hip::leave_kernel};
  return kKernel;
}

}  // namespace sparse_attn::cpu
#endif
