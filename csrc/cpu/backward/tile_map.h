// Which key tiles each query tile sees, as bits.
#pragma once

#include <bit>
#include <cstdint>
#include <numeric>
#include <vector>

#include "integers.h"

namespace sparse_attn::cpu {

class TileMap {
 public:
  TileMap(int64_t query_tiles, int64_t key_tiles)
      : key_tiles_(key_tiles), words_(ceil_div(key_tiles, 64)), bits_(query_tiles * words_) {}

  uint64_t* row(int64_t query_tile) { return bits_.data() + query_tile * words_; }

  bool sees(int64_t query_tile, int64_t key_tile) const {
    return bits_[query_tile * words_ + key_tile / 64] >> key_tile % 64 & 1;
  }

  // The first key tile from `key_tile` on that the query tile sees; their number if none.
  int64_t next(int64_t query_tile, int64_t key_tile) const {
    const uint64_t* bits = bits_.data() + query_tile * words_;
    int64_t word = key_tile / 64;
    if (word >= words_) return key_tiles_;
    uint64_t rest = bits[word] & ~uint64_t{0} << key_tile % 64;
    while (rest == 0) {
      if (++word == words_) return key_tiles_;
      rest = bits[word];
    }
    return word * 64 + std::countr_zero(rest);
  }

  int64_t count(int64_t query_tile) const {
    const uint64_t* bits = bits_.data() + query_tile * words_;
    return std::accumulate(bits, bits + words_, int64_t{0},
                           [](int64_t n, uint64_t word) { return n + std::popcount(word); });
  }

 private:
  int64_t key_tiles_, words_;
  std::vector<uint64_t> bits_;
};

}  // namespace sparse_attn::cpu
