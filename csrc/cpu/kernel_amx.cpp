// The tile kernels on AMX, which multiplies bfloat16.
//
// Other dtypes are split into terms, x = high + low: two bfloat16 hold 16 bits of a mantissa, all
// of a float16's. A product then takes three: high high + high low + low high; what is left out is
// below 2^-16 of it.
//
// Packed K: for each half of the granule (16 keys), [term][head_dim / 32] tiles of [16 pairs][16
// keys][2]. Packed V: [term][head_dim_v / 16] tiles of [16 key pairs][16 dims][2]. Head dims are
// rounded up to 32 with zeros.
#if defined(__x86_64__)
#include "amx_kernels.h"
#include "key_cursor.h"
#include "standard_headers.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")

#define SPARSE_ATTN_ISA amx
#define SPARSE_ATTN_VECTOR_BYTES 64
#include "amx_tiles.h"
#include "softmax_state.h"

namespace sparse_attn::cpu {

namespace amx {

constexpr int64_t kBlockM = 64;
constexpr int64_t kStepGranules = 16;
constexpr int64_t kStepKeys = kStepGranules * kGranule;
constexpr int64_t kTilePeriod = kTile * 2;  // bytes of a tile of values, 16 keys in either half
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
inline constexpr int kTerms = 2;
template <>
inline constexpr int kTerms<BFloat16> = 1;

template <class T>
int64_t granule_bytes(int64_t dim) {
  return kTerms<T> * padded_dim(dim) * kGranule * 2;
}

// 32 numbers as two vectors of float32, the lanes outside of the mask 0.
struct Floats {
  __m512 x0, x1;
};

inline Floats load_floats(const float* p, __mmask32 mask) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16)};
}
inline Floats load_floats(const Float16* p, __mmask32 mask) {
  const __m512i x = _mm512_maskz_loadu_epi16(mask, p);
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(x)),
          _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1))};
}

template <class T>
__m512i narrow(Floats x);
template <>
inline __m512i narrow<Float16>(Floats x) {
  const __m256i low = _mm512_cvtps_ph(x.x0, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i high = _mm512_cvtps_ph(x.x1, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
template <>
inline __m512i narrow<BFloat16>(Floats x) {
  return (__m512i)_mm512_cvtne2ps_pbh(x.x1, x.x0);
}

inline void store_floats(float* p, __mmask32 mask, Floats x) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), x.x0);
  _mm512_mask_storeu_ps(p + 16, static_cast<__mmask16>(mask >> 16), x.x1);
}
template <class T>
inline void store_floats(T* p, __mmask32 mask, Floats x) {
  _mm512_mask_storeu_epi16(p, mask, narrow<T>(x));
}

// Stores all of them past the caches.
inline void stream_floats(float* p, Floats x) {
  stream(p, x.x0);
  stream(p + 16, x.x1);
}
template <class T>
inline void stream_floats(T* p, Floats x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow<T>(x));
}

// 32 numbers in bfloat16, as one term or the sum of two.
struct Split {
  __m512i high, low;
};

inline __m512 widen(__m256i bf16) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16);
}

// x - high, or 0 where high is infinite.
inline __m512 residual(__m512 x, __m512 high) {
  return _mm512_maskz_sub_ps(~_mm512_fpclass_ps_mask(high, 0x18), x, high);
}

inline Split split(Floats x) {
  const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(x.x1, x.x0);
  const __m512 low0 = residual(x.x0, widen(_mm512_castsi512_si256(high)));
  const __m512 low1 = residual(x.x1, widen(_mm512_extracti64x4_epi64(high, 1)));
  return {high, (__m512i)_mm512_cvtne2ps_pbh(low1, low0)};
}

template <class T>
inline Split load_split(const T* p, __mmask32 mask) {
  if constexpr (kTerms<T> == 1) {
    return {_mm512_maskz_loadu_epi16(mask, p), __m512i{}};
  } else {
    return split(load_floats(p, mask));
  }
}

template <class T>
void pack_k(const void* const* rows, int64_t head_dim, void* granule) {
  const int64_t dim = padded_dim(head_dim);
  for (int half = 0; half < 2; ++half) {
    uint16_t* dest = static_cast<uint16_t*>(granule) + half * kTerms<T> * 16 * dim;
    for (int64_t d = 0; d < head_dim; d += 32, dest += kTile) {
      const __mmask32 mask = lanes_within(d, head_dim);
      __m512i high[16], low[16];
      for (int i = 0; i < 16; ++i) {
        const Split x = load_split(static_cast<const T*>(rows[half * 16 + i]) + d, mask);
        high[i] = x.high;
        low[i] = x.low;
      }
      transpose_16x16(high);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(dest + i * 32, high[i]);
      if constexpr (kTerms<T> == 2) {
        transpose_16x16(low);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(dest + 16 * dim + i * 32, low[i]);
      }
    }
  }
}

template <class T>
void pack_v(const void* const* rows, int64_t head_dim_v, void* granule) {
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kLow);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < head_dim_v; d += 32) {
    const __mmask32 mask = lanes_within(d, head_dim_v);
    uint16_t* dest = static_cast<uint16_t*>(granule) + d / 16 * kTile;
    for (int i = 0; i < 16; ++i, dest += 32) {
      const Split even = load_split(static_cast<const T*>(rows[2 * i]) + d, mask);
      const Split odd = load_split(static_cast<const T*>(rows[2 * i + 1]) + d, mask);
      _mm512_store_si512(dest, _mm512_permutex2var_epi16(even.high, first, odd.high));
      _mm512_store_si512(dest + kTile, _mm512_permutex2var_epi16(even.high, second, odd.high));
      if constexpr (kTerms<T> == 2) {
        uint16_t* low = dest + padded_dim(head_dim_v) * kGranule;
        _mm512_store_si512(low, _mm512_permutex2var_epi16(even.low, first, odd.low));
        _mm512_store_si512(low + kTile, _mm512_permutex2var_epi16(even.low, second, odd.low));
      }
    }
  }
}

struct Scratch {
  float* scores;      // [kBlockM / 16][kStepKeys / 16] tiles
  uint16_t* weights;  // [term][kBlockM / 16][kStepKeys / 32] tiles
  float* acc;         // [kBlockM][padded head_dim_v]
  const uint16_t* q;  // [term][kBlockM][padded head_dim]
  float* m;           // [kBlockM] reference point of the weights, a score
  float* l;           // [kBlockM][kLanes] sums of weights, to be added up at the end
};

Scratch divide_scratch(std::byte* memory, int64_t head_dim_v, int terms) {
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

// Hides the keys that row r does not see: their scores become -inf.
inline void mask_row(float* scores, const Granule* granules, int num_granules, int64_t r) {
  const __m512 hidden = _mm512_set1_ps(kMinusInfinity);
  for (int g = 0; g < num_granules; ++g, scores += 2 * kFloatTile) {
    if (granules[g].visible == nullptr) continue;
    const uint32_t bits = ~granules[g].visible[r];
    _mm512_mask_storeu_ps(scores, static_cast<__mmask16>(bits), hidden);
    _mm512_mask_storeu_ps(scores + kFloatTile, static_cast<__mmask16>(bits >> 16), hidden);
  }
}

// scores = softcap * tanh(scores * factor)
inline void cap_row(float* scores, int64_t n, float factor, float softcap) {
  for (int64_t j = 0; j < n; j += kLanes) {
    store(scores + j * 16, tanh(load(scores + j * 16) * factor) * softcap);
  }
}

inline float row_max(const float* scores, int64_t n) {
  __m512 top0 = _mm512_load_ps(scores), top1 = _mm512_load_ps(scores + kFloatTile);
  for (int64_t j = 32; j < n; j += 32) {
    top0 = _mm512_max_ps(_mm512_load_ps(scores + j * 16), top0);
    top1 = _mm512_max_ps(_mm512_load_ps(scores + j * 16 + kFloatTile), top1);
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(top0, top1));
}

// What a lane's weights of one step may add up to.
constexpr float kHeadroom = 0x1p13f;

// weights = 2^((scores - m) * scale) in bfloat16, one term or two; adds them to 16 sums. Does not
// add them, and returns false, if they outgrow the headroom.
template <int kTerms>
inline bool exp_row(const float* scores, int64_t n, float scale, float m, uint16_t* weights,
                    float* sums) {
  const __m512 factor = _mm512_set1_ps(scale), base = _mm512_set1_ps(m);
  const auto logits = [&](const float* s) {
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(s), base), factor);
  };
  __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int64_t j = 0; j < n; j += 32) {
    const __m512 p0 = exp2_bf16(logits(scores + j * 16));
    const __m512 p1 = exp2_bf16(logits(scores + j * 16 + kFloatTile));
    sum0 = _mm512_add_ps(sum0, p0);
    sum1 = _mm512_add_ps(sum1, p1);
    if constexpr (kTerms == 1) {
      _mm512_store_si512(weights + j * 16, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
    } else {
      const Split p = split({p0, p1});
      _mm512_store_si512(weights + j * 16, p.high);
      _mm512_store_si512(weights + kBlockM * kStepKeys + j * 16, p.low);
    }
  }
  const __m512 sum = _mm512_add_ps(sum0, sum1);
  if (_mm512_cmp_ps_mask(sum, _mm512_set1_ps(kHeadroom), _CMP_GT_OQ) != 0) return false;
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), sum));
  return true;
}

// Turns the raw scores of one row into weights and brings (m, l, acc) up to date. The reference
// point m is the maximum of the row's first keys, and moves to the maximum of all only when a
// weight outgrows the headroom: so a row is read once, and acc is seldom scaled.
template <int kTerms>
inline void softmax_row(const Scratch& scratch, int64_t r, int64_t n, float scale,
                        int64_t acc_stride) {
  const float* scores = scratch.scores + r / 16 * 16 * kStepKeys + r % 16 * 16;
  uint16_t* weights = scratch.weights + r / 16 * 16 * kStepKeys + r % 16 * 32;
  float *m = scratch.m + r, *sums = scratch.l + r * kLanes;
  if (*m == kMinusInfinity) *m = row_max(scores, kGranule);
  if (*m > kMinusInfinity && exp_row<kTerms>(scores, n, scale, *m, weights, sums)) return;

  const float m_old = *m, m_new = std::max(m_old, row_max(scores, n));
  if (m_old > kMinusInfinity) {
    const float factor = std::exp2((m_old - m_new) * scale);
    store(sums, load(sums) * factor);
    float* acc = scratch.acc + r * acc_stride;
    for (int64_t d = 0; d < acc_stride; d += kLanes) store(acc + d, load(acc + d) * factor);
  }
  *m = m_new;
  const float base = m_new == kMinusInfinity ? 0.0f : m_new;
  exp_row<kTerms>(scores, n, scale, base, weights, sums);
}

// Whether the products can read the rows of q where they are.
template <class T>
bool q_is_in_place(const QueryTile& tile, int64_t padded_rows, float factor) {
  return kTerms<T> == 1 && factor > 0 && tile.rows == padded_rows &&
         tile.head_dim == padded_dim(tile.head_dim) && tile.q_row_stride == tile.head_dim &&
         reinterpret_cast<uintptr_t>(tile.q) % 64 == 0;
}

// The rows of q with the sign of the scale; for a scale of 0 what is finite becomes 0.
template <class T>
void copy_q(const QueryTile& tile, float factor, uint16_t* q) {
  const int64_t dim = padded_dim(tile.head_dim);
  const __m512i flips = _mm512_set1_epi16(factor < 0 ? -0x8000 : 0);
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  const auto sign = [&](__m512i x) {
    if (factor != 0) return _mm512_xor_si512(x, flips);
    return _mm512_maskz_mov_epi16(_mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent),
                                  x);
  };
  std::memset(q, 0, kTerms<T> * kBlockM * dim * 2);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* row = static_cast<const T*>(tile.q) + r * tile.q_row_stride;
    for (int64_t d = 0; d < tile.head_dim; d += 32) {
      const __mmask32 mask = lanes_within(d, tile.head_dim);
      const Split x = load_split(row + d, mask);
      _mm512_mask_storeu_epi16(q + r * dim + d, mask, sign(x.high));
      if constexpr (kTerms<T> == 2) {
        _mm512_mask_storeu_epi16(q + (kBlockM + r) * dim + d, mask, sign(x.low));
      }
    }
  }
}

// Returns the rows that must be repeated, see TileKernel. `logit_scale` makes a score a logit.
template <class T, bool kStreams>
uint64_t write_rows(const QueryTile& tile, const Scratch& scratch, double logit_scale) {
  const int64_t acc_stride = padded_dim(tile.head_dim_v);
  uint64_t repeated = 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float l = _mm512_reduce_add_ps(load(scratch.l + r * kLanes));
    const RowEnd end = finish_row(scratch.m[r] * logit_scale, l, tile.sink_logit);
    const __m512 factor = _mm512_set1_ps(end.factor);
    const float* acc = scratch.acc + r * acc_stride;
    __m512 zeros = _mm512_setzero_ps();  // NaN for what is not finite
    T* out = static_cast<T*>(tile.out) + r * tile.out_row_stride;
    for (int64_t d = 0; d < tile.head_dim_v; d += 32) {
      const __m512 acc0 = _mm512_loadu_ps(acc + d), acc1 = _mm512_loadu_ps(acc + d + 16);
      const Floats x = {_mm512_mul_ps(acc0, factor), _mm512_mul_ps(acc1, factor)};
      zeros = _mm512_fmadd_ps(_mm512_add_ps(acc0, acc1), _mm512_setzero_ps(), zeros);
      if constexpr (kStreams) {
        stream_floats(out + d, x);
      } else {
        store_floats(out + d, lanes_within(d, tile.head_dim_v), x);
      }
    }
    tile.lse[r] = end.lse;
    const bool is_finite = _mm512_cmp_ps_mask(zeros, zeros, _CMP_UNORD_Q) == 0;
    repeated |= static_cast<uint64_t>(!is_finite || !(scratch.m[r] > kMinusInfinity)) << r;
  }
  return repeated;
}

// Fetches row r of the tile that follows.
template <class T>
inline void prefetch_row(const QueryTile& tile, int64_t r) {
  if (tile.next_q == nullptr) return;
  const T* q = static_cast<const T*>(tile.next_q) + r * tile.q_row_stride;
  for (int64_t d = 0; d < tile.head_dim; d += 64 / sizeof(T)) _mm_prefetch(q + d, _MM_HINT_T1);
}

// Attention of one query tile over all keys that the cursor hands out.
template <class T>
uint64_t run_tile(const QueryTile& tile, KeyCursor& keys, std::byte* memory) {
  Scratch scratch = divide_scratch(memory, tile.head_dim_v, kTerms<T>);
  const int64_t dim = padded_dim(tile.head_dim), acc_stride = padded_dim(tile.head_dim_v);
  const bool is_strip = tile.rows <= 16 && kTerms<T> == 1;
  const int64_t rows = is_strip ? 16 : (tile.rows + 31) / 32 * 32;
  const ScoreScale scaling = split_scale(tile.scale);
  const double logit_scale = tile.softcap > 0 ? 1.0 : scaling.scale;
  const float scale = static_cast<float>(logit_scale * kLog2e);
  if (q_is_in_place<T>(tile, rows, scaling.q_factor)) {
    scratch.q = static_cast<const uint16_t*>(tile.q);
  } else {
    copy_q<T>(tile, scaling.q_factor, const_cast<uint16_t*>(scratch.q));
  }
  std::fill(scratch.m, scratch.m + rows, kMinusInfinity);
  std::fill(scratch.l, scratch.l + rows * kLanes, 0.0f);

  if (is_strip) enter_strip();
  Granule steps[2][kStepGranules];
  int n = keys.next(steps[0]);
  if (n == 0) std::fill(scratch.acc, scratch.acc + rows * acc_stride, 0.0f);
  for (int step = 0; n > 0; ++step) {
    const Granule* granules = steps[step % 2];
    const Granule* ahead = steps[(step + 1) % 2];
    const int num_ahead = keys.next(steps[(step + 1) % 2]);
    const int64_t k_bytes = granule_bytes<T>(dim), v_bytes = granule_bytes<T>(acc_stride);
    GranulePrefetch values(granules, n, &Granule::v, &Granule::v_high, v_bytes, v_bytes);
    GranulePrefetch next_keys(ahead, num_ahead, &Granule::k, &Granule::k_high, k_bytes,
                              k_bytes / 2);
    fence_compiler();
    score_step<kTerms<T>>(scratch, granules, n, rows, dim, values);
    fence_compiler();
    const bool any_masked =
        std::any_of(granules, granules + n, [](const Granule& g) { return g.visible != nullptr; });
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (step == 0) prefetch_row<T>(tile, r);
      float* scores = scratch.scores + r / 16 * 16 * kStepKeys + r % 16 * 16;
      if (tile.softcap > 0) {
        cap_row(scores, n * kGranule, scaling.scale / tile.softcap, tile.softcap);
      }
      if (any_masked) mask_row(scores, granules, n, r);
      softmax_row<kTerms<T>>(scratch, r, n * kGranule, scale, acc_stride);
    }
    fence_compiler();
    value_step<kTerms<T>>(scratch, granules, n, rows, acc_stride, step == 0, next_keys);
    fence_compiler();
    n = num_ahead;
  }
  const auto write = tile.streams_out ? write_rows<T, true> : write_rows<T, false>;
  const uint64_t repeated = write(tile, scratch, logit_scale);
  if (is_strip) configure_tiles();
  return repeated;
}

template <class T>
constexpr TileKernel kTileKernel = {
    .block_m = kBlockM,
    .granules_per_step = kStepGranules,
    .k_granule_bytes = granule_bytes<T>,
    .v_granule_bytes = granule_bytes<T>,
    .v_period = kTilePeriod,
    .splits_keys = true,
    .most_rows_splitting_values = kTerms<T> == 1 ? 16 : 0,
    .pack_k = pack_k<T>,
    .pack_v = pack_v<T>,
    .scratch_bytes = scratch_bytes<T>,
    .run_tile = run_tile<T>,
    .enter = enter_kernel,
    .leave = leave_kernel,
};

}  // namespace amx

constinit const TileKernel kAmxTileFloat32 = amx::kTileKernel<float>;
constinit const TileKernel kAmxTileBFloat16 = amx::kTileKernel<amx::BFloat16>;
constinit const TileKernel kAmxTileFloat16 = amx::kTileKernel<amx::Float16>;

}  // namespace sparse_attn::cpu
#endif
