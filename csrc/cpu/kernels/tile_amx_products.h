// The products of a tile of queries with granules of keys on AMX: scores, and weighted values.
#pragma once

#include "cpu/kernels/tile_amx_pack.h"
#include "cpu/kernels/tile_kernel.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int64_t kBlockM = 64;
constexpr int64_t kStepGranules = 16;
constexpr int64_t kStepKeys = kStepGranules * kGranule;
constexpr int64_t kTilePeriod = kTile * 2;  // bytes of a tile of values, 16 keys in either half

struct Scratch {
  float* scores;      // [kBlockM / 16][kStepKeys / 16] tiles
  uint16_t* weights;  // [term][kBlockM / 16][kStepKeys / 32] tiles
  float* acc;         // [kBlockM][padded head_dim_v]
  const uint16_t* q;  // [term][kBlockM][padded head_dim]
  float* m;           // [kBlockM] reference point of the weights, a score
  float* l;           // [kBlockM][kLanes] sums of weights, to be added up at the end
};

inline Scratch divide_scratch(std::byte* memory, int64_t head_dim_v, int terms) {
  Scratch scratch;
  scratch.scores = reinterpret_cast<float*>(memory);
  scratch.acc = scratch.scores + kBlockM * kStepKeys;
  scratch.m = scratch.acc + kBlockM * padded_dim(head_dim_v);
  scratch.l = scratch.m + kBlockM;
  scratch.weights = reinterpret_cast<uint16_t*>(scratch.l + kBlockM * kLanes);
  scratch.q = scratch.weights + terms * kBlockM * kStepKeys;
  return scratch;
}

template <class T>
int64_t scratch_bytes(int64_t head_dim, int64_t head_dim_v) {
  return kBlockM * ((kStepKeys + padded_dim(head_dim_v) + 1 + kLanes) * 4 +
                    kTerms<T> * (kStepKeys + padded_dim(head_dim)) * 2);
}

// Fetches the keys of some granules, or their values, to the second-level cache, some lines at a
// time, while products of tiles in nearer caches are made.
class GranulePrefetch {
 public:
  using Part = const void* Granule::*;

  // Of `bytes`, the halves hold `run` bytes in turns; the first may hold all.
  GranulePrefetch(const Granule* granules, int num_granules, Part low, Part high, int64_t bytes,
                  int64_t run)
      : granule_(granules),
        end_(granules + num_granules),
        halves_{low, high},
        bytes_(bytes),
        run_(run) {
    begin_run();
  }

  // The next so many calls share the work.
  void spread_over(int64_t calls) {
    share_ = ((end_ - granule_) * bytes_ / 64 + calls - 1) / calls * 64;
  }

  void next() {
    for (int64_t todo = share_; todo > 0 && granule_ != end_;) {
      const char* begin = line_;
      const int64_t bytes = std::min(todo, run_end_ - begin);
      line_ += bytes;
      todo -= bytes;
      for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(begin + i, _MM_HINT_T1);
      if (line_ < run_end_) return;
      offset_ += run_;
      half_ = !half_;
      if (offset_ == bytes_) {
        offset_ = 0;
        half_ = false;
        ++granule_;
      }
      begin_run();
    }
  }

 private:
  void begin_run() {
    if (granule_ == end_) return;
    line_ = static_cast<const char*>(granule_->*halves_[half_]) + offset_ - (half_ ? run_ : 0);
    run_end_ = line_ + run_;
  }

  const Granule* granule_;
  const Granule* end_;
  Part halves_[2];
  int64_t bytes_, run_, offset_ = 0, share_ = 0;
  bool half_ = false;
  const char* line_ = nullptr;
  const char* run_end_ = nullptr;
};

// The sums of acc[32][32].
inline TileSums::Place output_place(float* acc, int64_t stride) {
  return {acc, stride, 16, 16 * stride};
}

// The sums of scores[32][32].
inline TileSums::Place score_place(float* scores) {
  return {scores, 16, kFloatTile, 16 * kStepKeys};
}

// 32 rows of 32 numbers, the left factor.
inline void load_left(const uint16_t* a, int64_t stride) {
  _tile_loadd(4, a, stride * 2);
  _tile_loadd(5, a + 16 * stride, stride * 2);
}

// The weights of 32 rows and 32 keys, the left factor.
inline void load_weights(const uint16_t* a) {
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a + 16 * kStepKeys, 64);
}

// Two packed tiles, the right factor.
inline void load_right(const uint16_t* b0, const uint16_t* b1) {
  _tile_loadd(6, b0, 64);
  _tile_loadd(7, b1, 64);
}

// Of the two halves of a granule the one with this number, counted over all granules.
inline const uint16_t* half_of(const void* low, const void* high, int half) {
  return static_cast<const uint16_t*>(half % 2 == 0 ? low : high);
}

// scores[32][32] = q[32][head_dim] k[32][head_dim]^T
template <int kTerms>
inline void score_block(const uint16_t* q, int64_t dim, const uint16_t* k, const uint16_t* k_high,
                        float* scores, TileSums& sums, GranulePrefetch& values) {
  sums.start(score_place(scores), true);
  for (int64_t d = 0; d < dim; d += 32) {
    load_left(q + d, dim);
    if constexpr (kTerms == 2) {
      load_right(k + (dim + d) * 16, k_high + (dim + d) * 16);
      sums.add();
    }
    load_right(k + d * 16, k_high + d * 16);
    sums.add();
    values.next();
    if constexpr (kTerms == 2) {
      load_left(q + kBlockM * dim + d, dim);
      sums.add();
    }
  }
}

// scores[32][keys] = q[32][64] k[keys][64]^T for the rows from `row` on. All of q stays in tiles 4
// to 7, which halves the loads.
inline void score_rows_dim64(const uint16_t* q, int64_t row, const Granule* granules,
                             int num_granules, float* scores, GranulePrefetch& values) {
  _tile_loadd(4, q, 128);
  _tile_loadd(5, q + 32, 128);
  _tile_loadd(6, q + 16 * 64, 128);
  _tile_loadd(7, q + 16 * 64 + 32, 128);
  float* held = nullptr;
  for (int half = 0; half < 2 * num_granules; ++half, scores += kFloatTile) {
    if (!granules[half / 2].rows.meets(row, 32)) continue;
    const uint16_t* k = half_of(granules[half / 2].k, granules[half / 2].k_high, half);
    _tile_loadd(2, k, 64);
    _tile_loadd(3, k + kTile, 64);
    if (held != nullptr) _tile_stored(0, held, 64);
    _tile_zero(0);
    _tile_dpbf16ps(0, 4, 2);
    if (held != nullptr) _tile_stored(1, held + 16 * kStepKeys, 64);
    _tile_zero(1);
    _tile_dpbf16ps(1, 6, 2);
    _tile_dpbf16ps(0, 5, 3);
    _tile_dpbf16ps(1, 7, 3);
    values.next();
    held = scores;
  }
  if (held != nullptr) {
    _tile_stored(0, held, 64);
    _tile_stored(1, held + 16 * kStepKeys, 64);
  }
}

// Strips of 16 rows fetch nothing ahead: they use each key for so short a time that this would only
// hold up the loads. They take the halves of granules one by one, as these may lie apart. Tile 4
// holds q and 5 keys; 6 holds the weights of 16 keys and 7 their values.
inline void enter_strip() {
  static constexpr TileConfig kConfig = {
      .bytes_per_row = {64, 64, 64, 64, 64, 64, 32, 64},
      .rows = {16, 16, 16, 16, 16, 16, 16, 8},
  };
  _tile_loadconfig(&kConfig);
}

// scores[16][keys] = q[16][head_dim] k[keys][head_dim]^T, four halves at a time.
inline void score_strip(const uint16_t* q, int64_t dim, const Granule* granules, int num_granules,
                        float* scores) {
  for (int g = 0; g < num_granules; g += 2, scores += 4 * kFloatTile) {
    const Granule& other = granules[std::min(g + 1, num_granules - 1)];
    const uint16_t* k0 = static_cast<const uint16_t*>(granules[g].k);
    const uint16_t* k1 = static_cast<const uint16_t*>(granules[g].k_high);
    const uint16_t* k2 = static_cast<const uint16_t*>(other.k);
    const uint16_t* k3 = static_cast<const uint16_t*>(other.k_high);
    zero_sums();
    for (int64_t d = 0; d < dim; d += 32) {
      _tile_loadd(4, q + d, dim * 2);
      _tile_loadd(5, k0 + d * 16, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(5, k1 + d * 16, 64);
      _tile_dpbf16ps(1, 4, 5);
      _tile_loadd(5, k2 + d * 16, 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(5, k3 + d * 16, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + kFloatTile, 64);
    if (g + 1 == num_granules) break;
    _tile_stored(2, scores + 2 * kFloatTile, 64);
    _tile_stored(3, scores + 3 * kFloatTile, 64);
  }
}

// scores[rows][keys] = q k^T for all keys of a step; blocks of 32 rows that see nothing of a
// granule are left out. Fetches the values of the same keys.
template <int kTerms>
void score_step(const Scratch& scratch, const Granule* granules, int num_granules, int64_t rows,
                int64_t dim, GranulePrefetch& values) {
  if (kTerms == 1 && rows == 16) {
    score_strip(scratch.q, dim, granules, num_granules, scratch.scores);
    return;
  }
  values.spread_over(num_granules * (rows / 32) * (dim / 32));
  if (kTerms == 1 && dim == 64) {
    for (int64_t r = 0; r < rows; r += 32) {
      score_rows_dim64(scratch.q + r * dim, r, granules, num_granules,
                       scratch.scores + r * kStepKeys, values);
    }
    return;
  }
  TileSums sums;
  for (int g = 0; g < num_granules; ++g) {
    for (int64_t r = 0; r < rows; r += 32) {
      if (!granules[g].rows.meets(r, 32)) continue;
      score_block<kTerms>(scratch.q + r * dim, dim, static_cast<const uint16_t*>(granules[g].k),
                          static_cast<const uint16_t*>(granules[g].k_high),
                          scratch.scores + r * kStepKeys + g * 2 * kFloatTile, sums, values);
    }
  }
  sums.store();
}

// acc[32][32] += weights[32][keys] v[keys][32] for the rows from `row` on
template <int kTerms>
inline void value_block(const uint16_t* weights, int64_t row, const Granule* granules,
                        int num_granules, int64_t d, float* acc, int64_t acc_stride, bool is_first,
                        TileSums& sums, GranulePrefetch& keys) {
  sums.start(output_place(acc, acc_stride), is_first);
  for (int g = 0; g < num_granules; ++g, weights += kTile) {
    if (!granules[g].rows.meets(row, 32)) continue;
    const uint16_t* v = static_cast<const uint16_t*>(granules[g].v) + d / 16 * kTile;
    load_weights(weights);
    if constexpr (kTerms == 2) {
      const uint16_t* v_low = v + acc_stride * kGranule;
      load_right(v_low, v_low + kTile);
      sums.add();
    }
    load_right(v, v + kTile);
    sums.add();
    keys.next();
    if constexpr (kTerms == 2) {
      load_weights(weights + kBlockM * kStepKeys);
      sums.add();
    }
  }
  sums.finish();
}

// acc[16][32 * kPairs] += weights[16][keys] v[keys][32 * kPairs]
template <int kPairs>
inline void value_strip(const uint16_t* weights, const Granule* granules, int num_granules,
                        int64_t d, float* acc, int64_t acc_stride, bool is_first) {
  if (is_first) {
    zero_sums();
  } else {
    _tile_loadd(0, acc, acc_stride * 4);
    _tile_loadd(1, acc + 16, acc_stride * 4);
    if constexpr (kPairs == 2) {
      _tile_loadd(2, acc + 32, acc_stride * 4);
      _tile_loadd(3, acc + 48, acc_stride * 4);
    }
  }
  for (int half = 0; half < 2 * num_granules; ++half) {
    const Granule& granule = granules[half / 2];
    const uint16_t* v = half_of(granule.v, granule.v_high, half) + d / 16 * kTile;
    _tile_loadd(6, weights + half / 2 * kTile + half % 2 * 16, 64);
    _tile_loadd(7, v, 64);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(7, v + kTile, 64);
    _tile_dpbf16ps(1, 6, 7);
    if constexpr (kPairs == 2) {
      _tile_loadd(7, v + 2 * kTile, 64);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(7, v + 3 * kTile, 64);
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, acc, acc_stride * 4);
  _tile_stored(1, acc + 16, acc_stride * 4);
  if constexpr (kPairs == 2) {
    _tile_stored(2, acc + 32, acc_stride * 4);
    _tile_stored(3, acc + 48, acc_stride * 4);
  }
}

// acc[rows][head_dim_v] += weights v for all keys of a step; the first step sets acc. Fetches the
// keys of the next step.
template <int kTerms>
void value_step(const Scratch& scratch, const Granule* granules, int num_granules, int64_t rows,
                int64_t acc_stride, bool is_first, GranulePrefetch& keys) {
  if (kTerms == 1 && rows == 16) {
    int64_t d = 0;
    for (; d + 64 <= acc_stride; d += 64) {
      value_strip<2>(scratch.weights, granules, num_granules, d, scratch.acc + d, acc_stride,
                     is_first);
    }
    if (d < acc_stride) {
      value_strip<1>(scratch.weights, granules, num_granules, d, scratch.acc + d, acc_stride,
                     is_first);
    }
    return;
  }
  keys.spread_over(num_granules * (rows / 32) * (acc_stride / 32));
  TileSums sums;
  for (int64_t r = 0; r < rows; r += 32) {
    for (int64_t d = 0; d < acc_stride; d += 32) {
      value_block<kTerms>(scratch.weights + r * kStepKeys, r, granules, num_granules, d,
                          scratch.acc + r * acc_stride + d, acc_stride, is_first, sums, keys);
    }
  }
  sums.store();
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
