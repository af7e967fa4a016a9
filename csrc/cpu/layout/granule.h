// Granules, 32 keys of which a word of bits tells something, and the rows of a tile.
#pragma once

#include <cstdint>

namespace sparse_attn::cpu {

inline constexpr int kGranule = 32;   // keys in one packed unit of K and V
inline constexpr int kMaxRows = 128;  // rows in the largest query tile

inline constexpr uint32_t kAllKeys = ~uint32_t{0};

// Bits 0 ... n - 1.
inline uint32_t low_bits(int64_t n) {
  if (n <= 0) return 0;
  return n >= kGranule ? kAllKeys : (uint32_t{1} << n) - 1;
}

// The keys of [begin, end) among the 32 keys from `origin` on.
inline uint32_t range_bits(int64_t begin, int64_t end, int64_t origin) {
  return low_bits(end - origin) & ~low_bits(begin - origin);
}

// Rows [begin, end) of a query tile.
struct RowRange {
  int begin = 0, end = kMaxRows;

  bool meets(int64_t row, int64_t count) const { return row < end && row + count > begin; }
};

// The rows of a tile that see any key, from the first to the last, given one word for each row.
inline RowRange seeing_rows(const uint32_t* visible, int64_t rows) {
  RowRange range{0, static_cast<int>(rows)};
  while (range.begin < range.end && visible[range.begin] == 0) ++range.begin;
  while (range.end > range.begin && visible[range.end - 1] == 0) --range.end;
  return range;
}

}  // namespace sparse_attn::cpu
