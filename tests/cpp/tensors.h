// Random numbers, and tensors in heap blocks of exactly the size that their strides need, so that
// AddressSanitizer sees any access outside of one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "params.h"

namespace sparse_attn::testing {

inline std::mt19937 generator(20240229);

inline int64_t random_int(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

template <class T>
T choose(std::initializer_list<T> values) {
  return values.begin()[random_int(0, static_cast<int64_t>(values.size()) - 1)];
}

// float16 and bfloat16 as bits; only normal numbers and zero occur here.
inline uint16_t to_half(float x, DType dtype) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == DType::kBFloat16) return static_cast<uint16_t>(bits >> 16);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
  if (exponent <= 0) return 0;
  if (exponent >= 31)
    return static_cast<uint16_t>((bits >> 16 & 0x8000) | (x != x ? 0x7e00 : 0x7c00));
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
}

inline double from_half(uint16_t x, DType dtype) {
  if (dtype == DType::kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  }
  const double magnitude = (x >> 10 & 31) == 0 ? std::ldexp(x & 1023, -24)
                                               : std::ldexp(1024 + (x & 1023), (x >> 10 & 31) - 25);
  return x & 0x8000 ? -magnitude : magnitude;
}

// As torch's: kernels treat whole cache lines in their own ways.
template <class T>
struct LineAllocator {
  using value_type = T;

  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const LineAllocator&) const = default;
};

// A [batch, heads, rows, dim] tensor in a heap block of exactly the size it needs. Strides are
// multiples of `alignment`, as dim must be.
struct Tensor {
  DType dtype;
  int64_t sizes[4];
  Strides strides;
  std::vector<char, LineAllocator<char>> bytes;

  Tensor(DType type, int64_t batch, int64_t heads, int64_t rows, int64_t dim, int64_t alignment = 1)
      : dtype(type), sizes{batch, heads, rows, dim} {
    const int64_t slack = choose<int64_t>({0, 0, 3}) * alignment;
    if (random_int(0, 1) == 0) {
      strides.row = dim + slack;
      strides.head = strides.row * rows;
      strides.batch = strides.head * heads;
    } else {  // [batch, rows, heads, dim] in memory
      strides.head = dim + slack;
      strides.row = strides.head * heads;
      strides.batch = strides.row * rows;
    }
    const bool empty = batch * heads * rows * dim == 0;
    const int64_t elements = empty ? 0
                                   : (batch - 1) * strides.batch + (heads - 1) * strides.head +
                                         (rows - 1) * strides.row + dim;
    // Ones in every bit are NaN in every type.
    bytes.assign(elements * sparse_attn::element_size(dtype), static_cast<char>(0xff));
  }

  int64_t offset(int64_t b, int64_t h, int64_t r, int64_t d) const {
    return b * strides.batch + h * strides.head + r * strides.row + d;
  }

  double at(int64_t b, int64_t h, int64_t r, int64_t d) const {
    const char* p = bytes.data() + offset(b, h, r, d) * sparse_attn::element_size(dtype);
    if (dtype == DType::kFloat32) {
      float x;
      std::memcpy(&x, p, 4);
      return x;
    }
    uint16_t x;
    std::memcpy(&x, p, 2);
    return from_half(x, dtype);
  }

  void set(int64_t b, int64_t h, int64_t r, int64_t d, float x) {
    const uint16_t half = to_half(x, dtype);
    char* p = bytes.data() + offset(b, h, r, d) * sparse_attn::element_size(dtype);
    if (dtype == DType::kFloat32) {
      std::memcpy(p, &x, 4);
    } else {
      std::memcpy(p, &half, 2);
    }
  }

  void fill_normal() {
    std::normal_distribution<float> normal;
    for (int64_t b = 0; b < sizes[0]; ++b)
      for (int64_t h = 0; h < sizes[1]; ++h)
        for (int64_t r = 0; r < sizes[2]; ++r)
          for (int64_t d = 0; d < sizes[3]; ++d) set(b, h, r, d, normal(generator));
  }

  // Puts a number that is not finite, or a huge or tiny one, into a row.
  void poison() {
    if (sizes[2] == 0) return;
    set(random_int(0, sizes[0] - 1), random_int(0, sizes[1] - 1), random_int(0, sizes[2] - 1),
        random_int(0, sizes[3] - 1),
        choose({NAN, INFINITY, -INFINITY, 6e4f, 3e18f, -3e38f, 1e-40f}));
  }
};

}  // namespace sparse_attn::testing
