// The tile kernels on AMX, which multiplies bfloat16.
#if defined(__x86_64__)
#include "cpu/kernels/amx_kernels.h"
#include "cpu/kernels/key_cursor.h"
#include "cpu/simd/standard_headers.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")

#define SPARSE_ATTN_ISA amx
#define SPARSE_ATTN_VECTOR_BYTES 64
#include "cpu/kernels/tile_amx_pack.h"
#include "cpu/kernels/tile_amx_products.h"
#include "cpu/simd/softmax_state.h"

namespace sparse_attn::cpu {

namespace amx {

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

// scores = scores * factor + the terms of the granules' keys, for row r.
inline void add_terms(float* scores, const Granule* granules, int num_granules, int64_t r,
                      float factor) {
  const float row = static_cast<float>(r);
  for (int g = 0; g < num_granules; ++g) {
    const KeyTerms<kGranule>& terms = *granules[g].terms;
    for (int j = 0; j < kGranule; j += kLanes, scores += kFloatTile) {
      const Vec distance = absolute(row - load(terms.offset + j));
      store(scores, load(scores) * factor + (load(terms.bias + j) - terms.slope * distance));
    }
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
  const bool is_biased = keys.is_biased();
  const double logit_scale = tile.softcap > 0 || is_biased ? 1.0 : scaling.scale;
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
      if (is_biased) add_terms(scores, granules, n, r, tile.softcap > 0 ? 1.0f : scaling.scale);
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
