// Float vectors of one instruction set and the functions of one variable that attention needs.
//
// Every including file defines SPARSE_ATTN_ISA (a namespace of its own, so that functions compiled
// for different instruction sets never share a symbol) and SPARSE_ATTN_VECTOR_BYTES, and includes
// the standard headers before it switches the target.
#pragma once

#include "cpu/simd/standard_headers.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

inline constexpr int kLanes = SPARSE_ATTN_VECTOR_BYTES / sizeof(float);

typedef float Vec __attribute__((vector_size(SPARSE_ATTN_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(SPARSE_ATTN_VECTOR_BYTES)));
typedef Vec UnalignedVec __attribute__((aligned(4), may_alias));

#define SPARSE_ATTN_INLINE static inline __attribute__((always_inline))

SPARSE_ATTN_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
SPARSE_ATTN_INLINE void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }

// Stores past the caches, at an aligned address. Other threads see it after end_streaming().
SPARSE_ATTN_INLINE void stream(float* p, Vec x) {
#if !defined(__x86_64__)
  store(p, x);
#elif SPARSE_ATTN_VECTOR_BYTES == 64
  __builtin_ia32_movntps512(p, x);
#elif SPARSE_ATTN_VECTOR_BYTES == 32
  __builtin_ia32_movntps256(p, x);
#else
  __builtin_ia32_movntps(p, x);
#endif
}

SPARSE_ATTN_INLINE Vec broadcast(float x) { return x - Vec{}; }
SPARSE_ATTN_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
SPARSE_ATTN_INLINE Vec absolute(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }

SPARSE_ATTN_INLINE float reduce_max(Vec x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// The maximum, or NaN if either is.
SPARSE_ATTN_INLINE float maximum_or_nan(float a, float b) { return a > b || a != a ? a : b; }

SPARSE_ATTN_INLINE float reduce_add(Vec x) {
  float result = 0;
  for (int i = 0; i < kLanes; ++i) result += x[i];
  return result;
}

// Whether n numbers, in whole vectors, are all finite.
SPARSE_ATTN_INLINE bool all_finite(const float* x, int64_t n) {
  Vec sum = {};  // of zeros and, for what is not finite, NaN
  for (int64_t i = 0; i < n; i += kLanes) sum += load(x + i) * 0.0f;
  return reduce_add(sum) == 0.0f;
}

// x[i][j] becomes x[j][i], for kLanes vectors.
SPARSE_ATTN_INLINE void transpose(Vec* x) {
  IntVec low, high;  // lanes of two vectors, one after the other, in turn
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  for (int step = 1; step < kLanes; step *= 2) {
    Vec y[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + kLanes / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

// 2^(x * factor) for x <= 0 and a positive, normal factor, to about one ulp; exactly 0 below
// 2^-126, and for -inf. NaN stays NaN.
SPARSE_ATTN_INLINE Vec exp2_nonpositive(Vec x, float factor = 1.0f) {
  const float least = -127.0f / factor;
  const Vec clamped = x < least ? broadcast(least) : x;
  constexpr float kRound = 0x1.8p23f + 127;  // leaves the exponent's bits as the lowest ones
  const Vec shifted = clamped * factor + kRound;
  const Vec r = clamped * factor - (shifted - kRound);
  Vec p = broadcast(1.5345811278e-4f);
  p = p * r + 1.3399931213e-3f;
  p = p * r + 9.6184889598e-3f;
  p = p * r + 5.5503287770e-2f;
  p = p * r + 2.4022646891e-1f;
  p = p * r + 6.9314720574e-1f;
  p = p * r + 1.0f;
  return p * (Vec)((IntVec)shifted << 23);
}

// What tanh is made of: near 0, where relative error counts, x + x * tanh_series(x * x), and
// elsewhere 1 - 2 / (exp(2x) + 1), the sign of x apart.
inline constexpr float kTanhNear = 0.35f;

SPARSE_ATTN_INLINE Vec tanh_series(Vec square) {
  Vec series = broadcast(3.5921280365724810e-3f);
  series = series * square - 8.8632355299021966e-3f;
  series = series * square + 2.1869488536155203e-2f;
  series = series * square - 5.3968253968253971e-2f;
  series = series * square + 1.3333333333333333e-1f;
  series = series * square - 3.3333333333333333e-1f;
  return series * square;
}

SPARSE_ATTN_INLINE Vec tanh_far(Vec x, Vec magnitude) {
  constexpr float kMinusTwoLog2e = -2.8853900817779268f;
  const Vec e = exp2_nonpositive(magnitude * kMinusTwoLog2e);
  const Vec far = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -far : far;
}

SPARSE_ATTN_INLINE Vec tanh(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  const Vec near = x + x * tanh_series(x * x);
  return magnitude < kTanhNear ? near : tanh_far(x, magnitude);
}

// cap * tanh(x / cap), for any positive cap: the quotient may vanish.
SPARSE_ATTN_INLINE Vec cap_softly(Vec x, float cap) {
  const Vec ratio = x / cap;
  const Vec magnitude = ratio < 0.0f ? -ratio : ratio;
  const Vec near = x + x * tanh_series(ratio * ratio);
  return magnitude < kTanhNear ? near : tanh_far(ratio, magnitude) * cap;
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
