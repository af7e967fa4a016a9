// What kernels are made of: one set of names, one implementation for GPUs (PTX) and one for the
// emulator of tests/cuda_emulation. Kernels touch threads, shared and global memory only through
// these.
//
// Addresses in shared memory are numbers, and those in global memory are `Global<T>`, which cannot
// be dereferenced. So no access escapes the emulator's checks.
//
// Fragments of a product of 16 rows, 8 columns and a depth of 16, held by lane 4 * r + c: `a` holds
// rows r and r + 8 at depths 2c, 2c + 1, then the same rows 8 deeper; `b` holds depths 2c, 2c + 1,
// then 8 deeper, of column r; `d` holds columns 2c, 2c + 1 of row r, then of row r + 8.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__
#define UNROLL _Pragma("unroll")
#define UNROLL_BY_4 _Pragma("unroll 4")
#define NO_UNROLL _Pragma("unroll 1")
#else
#define DEVICE inline __attribute__((always_inline))
#define HOST_DEVICE inline
#define UNROLL
#define UNROLL_BY_4
#define NO_UNROLL
#endif

namespace sparse_attn::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct alignas(8) Int2 {
  int x, y;
};
struct alignas(16) Int4 {
  int x, y, z, w;
};

// The address of a T in global memory.
template <class T>
class Global {
 public:
  Global() = default;
  HOST_DEVICE explicit Global(T* pointer) : pointer_(pointer) {}
  HOST_DEVICE Global operator+(int64_t elements) const { return Global(pointer_ + elements); }
  HOST_DEVICE bool is_null() const { return pointer_ == nullptr; }

 private:
  friend struct RawPointer;
  T* pointer_ = nullptr;
};

// For the primitives themselves.
struct RawPointer {
  template <class T>
  HOST_DEVICE static T* of(Global<T> global) {
    return global.pointer_;
  }
};

}  // namespace sparse_attn::cuda

#if defined(__CUDACC__)
#include "cuda/primitives_ptx.h"
#else
#include "primitives_emulated.h"
#endif
