// float32, bfloat16 and float16 as floats, and the words that lanes multiply.
#pragma once

#include "cpu/simd/vector_math.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SPARSE_ATTN_INLINE float to_float(float x) { return x; }
SPARSE_ATTN_INLINE float to_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
SPARSE_ATTN_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t infinite = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  // A subnormal number counts units of 2^-24, as what follows 0.5 in its last places does.
  const float subnormal = std::bit_cast<float>(0x3f000000 | (magnitude >> 13)) - 0.5f;
  const uint32_t value =
      magnitude < 0x00800000 ? std::bit_cast<uint32_t>(subnormal) : magnitude + 0x38000000;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  return std::bit_cast<float>(value | infinite | sign);
}

SPARSE_ATTN_INLINE void from_float(float x, float& result) { result = x; }
SPARSE_ATTN_INLINE void from_float(float x, BFloat16& result) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  result.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
SPARSE_ATTN_INLINE void from_float(float x, Float16& result) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let an addition round at the right bit
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  result.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

// What a lane multiplies and adds: words of one number, or of two that follow each other in the
// dimension that is summed over.
struct FloatWords {
  using Number = float;
  using Word = float;
  static constexpr int kNumbers = 1;

  SPARSE_ATTN_INLINE Vec broadcast_word(Word x) { return broadcast(x); }
  SPARSE_ATTN_INLINE Vec multiply_add(Vec x, Vec y, Vec sum) { return x * y + sum; }
  SPARSE_ATTN_INLINE Vec load_words(const Word* p) { return load(p); }
  SPARSE_ATTN_INLINE Vec join(const Vec* numbers) { return numbers[0]; }
};

#ifdef SPARSE_ATTN_BFLOAT16_PAIRS
struct BFloat16Pairs {
  using Number = BFloat16;
  using Word = uint32_t;
  static constexpr int kNumbers = 2;

  SPARSE_ATTN_INLINE Vec broadcast_word(Word x) {
    return (Vec)_mm512_set1_epi32(static_cast<int32_t>(x));
  }
  SPARSE_ATTN_INLINE Vec multiply_add(Vec x, Vec y, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
  }
  SPARSE_ATTN_INLINE Vec load_words(const Word* p) { return (Vec)_mm512_loadu_si512(p); }
  // Rounds 32 numbers, in their order.
  SPARSE_ATTN_INLINE __m512i round(Vec first, Vec second) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
  // Rounds numbers[0] into the lower half of each word, numbers[1] into the upper one.
  SPARSE_ATTN_INLINE Vec join(const Vec* numbers) {
    const __m512i halves = round(numbers[0], numbers[1]);
    alignas(64) static constexpr auto kInTurn = [] {
      std::array<uint16_t, 2 * kLanes> order{};
      for (int i = 0; i < 2 * kLanes; ++i) order[i] = i / 2 + i % 2 * kLanes;
      return order;
    }();
    return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(kInTurn.data()), halves);
  }
};
#endif

// kLanes elements as floats.
SPARSE_ATTN_INLINE Vec load_floats(const float* p) { return load(p); }
#if SPARSE_ATTN_VECTOR_BYTES == 64
SPARSE_ATTN_INLINE Vec load_floats(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
SPARSE_ATTN_INLINE Vec load_floats(const Float16* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif SPARSE_ATTN_VECTOR_BYTES == 32
SPARSE_ATTN_INLINE Vec load_floats(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
SPARSE_ATTN_INLINE Vec load_floats(const Float16* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#else
template <class T>
SPARSE_ATTN_INLINE Vec load_floats(const T* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
}
#endif

// The first n elements as floats, and zeros.
template <class T>
SPARSE_ATTN_INLINE Vec load_floats(const T* p, int64_t n) {
#if SPARSE_ATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 2) {
    const auto lanes = static_cast<__mmask16>((1u << n) - 1);
    alignas(32) T padded[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(padded), _mm256_maskz_loadu_epi16(lanes, p));
    return load_floats(padded);
  }
#endif
  T padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load_floats(padded);
}

// kLanes floats, each rounded.
SPARSE_ATTN_INLINE void store_rounded(float* p, Vec x) { store(p, x); }
#if SPARSE_ATTN_VECTOR_BYTES == 64
SPARSE_ATTN_INLINE void store_rounded(Float16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, 0));
}
#elif SPARSE_ATTN_VECTOR_BYTES == 32
SPARSE_ATTN_INLINE void store_rounded(Float16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
}
#else
SPARSE_ATTN_INLINE void store_rounded(Float16* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p[i]);
}
#endif
SPARSE_ATTN_INLINE void store_rounded(BFloat16* p, Vec x) {
  typedef uint32_t Bits __attribute__((vector_size(SPARSE_ATTN_VECTOR_BYTES)));
  typedef uint16_t Halves __attribute__((vector_size(SPARSE_ATTN_VECTOR_BYTES / 2)));
  const Bits bits = (Bits)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Halves halves = __builtin_convertvector(x != x ? Bits{} + 0x7fc0 : rounded, Halves);
  std::memcpy(p, &halves, sizeof(halves));
}

template <class T>
static void convert_row(const T* source, int64_t n, float* dest) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dest + i, load_floats(source + i));
  for (; i < n; ++i) dest[i] = to_float(source[i]);
}

// dest = source * factor
template <class T>
static void round_row(const float* source, float factor, int64_t n, T* dest) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_rounded(dest + i, load(source + i) * factor);
  for (; i < n; ++i) from_float(source[i] * factor, dest[i]);
}

template <class Words>
static inline int64_t num_words(int64_t n) {
  return (n + Words::kNumbers - 1) / Words::kNumbers;
}

// One row as words of one or two dims.
template <class T, class Words>
static void copy_words(const void* row, int64_t dim, typename Words::Word* dest) {
  if constexpr (Words::kNumbers == 1) {
    convert_row(static_cast<const T*>(row), dim, dest);
  } else {
    if (dim % 2 != 0) dest[dim / 2] = 0;
    std::memcpy(dest, row, dim * sizeof(T));
  }
}

// One or two rows as words of a number of each.
template <class T, class Words>
static void join_rows(const void* const* rows, int64_t dim, typename Words::Word* dest) {
  const T* row = static_cast<const T*>(rows[0]);
  if constexpr (Words::kNumbers == 1) {
    convert_row(row, dim, dest);
  } else {
    const T* next = static_cast<const T*>(rows[1]);
    for (int64_t d = 0; d < dim; ++d) {
      dest[d] = row[d].bits | static_cast<uint32_t>(next[d].bits) << 16;
    }
  }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
