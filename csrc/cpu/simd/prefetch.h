// Fetching memory ahead of its use.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace sparse_attn::cpu {

// Fetches a stretch of memory to the second-level cache, some lines at a time, while work goes on
// in nearer caches.
class Prefetch {
 public:
  // `begin` may be null: nothing to fetch.
  Prefetch(const std::byte* begin, int64_t bytes)
      : line_(begin), end_(begin != nullptr ? begin + bytes : nullptr) {}

  // The next so many calls share the work.
  void spread_over(int64_t calls) {
    const int64_t lines = (end_ - line_ + 63) / 64;
    share_ = (lines + calls - 1) / std::max<int64_t>(1, calls) * 64;
  }

  void next() {
    const std::byte* begin = line_;
    const int64_t bytes = std::min(share_, end_ - begin);
    line_ += bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i, 0, 2);
  }

 private:
  const std::byte* line_;
  const std::byte* end_;
  int64_t share_ = 0;
};

}  // namespace sparse_attn::cpu
