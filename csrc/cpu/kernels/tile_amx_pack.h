// Numbers as AMX multiplies them, in bfloat16, and packed keys.
//
// Other dtypes are split into terms, x = high + low: two bfloat16 hold 16 bits of a mantissa, all
// of a float16's. A product then takes three: high high + high low + low high; what is left out is
// below 2^-16 of it.
//
// Packed K: for each half of the granule (16 keys), [term][head_dim / 32] tiles of [16 pairs][16
// keys][2]. Packed V: [term][head_dim_v / 16] tiles of [16 key pairs][16 dims][2]. Head dims are
// rounded up to 32 with zeros.
#pragma once

#include "cpu/layout/granule.h"
#include "cpu/simd/amx_tiles.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

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

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
