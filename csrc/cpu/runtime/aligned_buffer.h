// Memory aligned to cache lines, or to huge pages when it is large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/runtime/huge_pages.h"

namespace sparse_attn::cpu {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { release(); }

  std::byte* data() const { return data_; }
  int64_t capacity() const { return capacity_; }

  // Makes room for at least `bytes`; what was stored is lost when the buffer has to grow.
  void reserve(int64_t bytes) {
    if (bytes <= capacity_) return;
    const int64_t alignment = bytes >= kHugePage / 2 ? kHugePage : 64;
    release();
    capacity_ = (bytes + alignment - 1) / alignment * alignment;
    data_ = static_cast<std::byte*>(std::aligned_alloc(alignment, capacity_));
    if (data_ == nullptr) {
      capacity_ = 0;
      throw std::bad_alloc();
    }
    prefer_huge_pages(data_, capacity_);
  }

  void release() {
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
  }

 private:
  std::byte* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace sparse_attn::cpu
