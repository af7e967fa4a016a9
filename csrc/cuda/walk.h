// The keys of a tile of rows, tile by tile: first the band (sink and window), then the listed
// blocks, then the columns. A tile of the band accounts for what rows see through sink or window, a
// tile of a list for the rest, so each pair counts once.
//
// Counts and indices are untrusted: counts are clamped, and an index that is out of range names no
// key.
#pragma once

#include "cuda/arguments.h"

namespace sparse_attn::cuda {

inline constexpr int kTileKeys = 64;
inline constexpr int kNoKey = 1 << 30;    // the position of what is not there
inline constexpr int kNoLimit = 1 << 30;  // a window that reaches all keys
inline constexpr int kMaxLength = 1 << 29;

DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int most(int a, int b) { return a < b ? b : a; }
DEVICE int distance(int a, int b) { return a < b ? b - a : a - b; }
DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE int tiles_of(int keys) { return ceil_div(keys, kTileKeys); }

// The positions of the rows of a tile, and the end of the keys that any of them may see.
struct RowSpan {
  int first, last, key_end;
};

struct Band {
  int sink, window;
  int begin[2], end[2];  // two ranges of keys that do not touch, or one and an empty one

  DEVICE bool contains(int p, int j) const { return j < sink || distance(p, j) < window; }

  DEVICE int size(int range) const { return most(end[range] - begin[range], 0); }
  DEVICE int num_tiles() const { return tiles_of(size(0)) + tiles_of(size(1)); }
  DEVICE int position(int tile, int n) const {
    const int skipped = tiles_of(size(0));
    const bool is_second = tile >= skipped;
    const int j =
        (is_second ? begin[1] + (tile - skipped) * kTileKeys : begin[0] + tile * kTileKeys) + n;
    return j < (is_second ? end[1] : end[0]) ? j : kNoKey;
  }
};

DEVICE int value_of(const HeadValues& values, int head) {
  return load(values.data + head / values.group);
}

template <class Arguments>
DEVICE Band band_of(const Arguments& arguments, int head, const RowSpan& rows) {
  Band band;
  band.sink = least(most(value_of(arguments.sink, head), 0), arguments.seqlen_kv);
  const int window = value_of(arguments.window, head);
  band.window = window < 0 ? kNoLimit : least(window, kNoLimit);
  band.begin[0] = 0;
  band.end[0] = least(band.sink, rows.key_end);
  band.begin[1] = most(rows.first - band.window + 1, 0);
  band.end[1] = least(rows.last + band.window, rows.key_end);
  if (band.window == 0) band.end[1] = band.begin[1];
  if (band.begin[1] <= band.end[0]) {
    band.end[0] = most(band.end[0], band.end[1]);
    band.end[1] = band.begin[1];
  }
  return band;
}

struct KeyList {
  Global<const int32_t> indices;
  int count;
};

// What a list names before `key_end`. Lists ascend, so the rest is cut off.
DEVICE KeyList list_of(const Lists& lists, int batch, int head, int row, int64_t keys_each,
                       int most_entries, int key_end) {
  if (lists.counts.is_null()) return {lists.indices, 0};
  const int64_t list =
      (static_cast<int64_t>(lists.is_shared ? 0 : batch) * lists.heads + head / lists.group) *
          lists.rows +
      row / lists.rows_each;
  const Global<const int32_t> indices = lists.indices + list * lists.width;
  int low = 0;
  int high = least(least(load(lists.counts + list), lists.width), most_entries);
  while (low < high) {
    const int middle = (low + high) / 2;
    if (load(indices + middle) * keys_each < key_end) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return {indices, low};
}

struct Walk {
  RowSpan rows;
  Band band;
  KeyList blocks, columns;
  Divisor block_kv;
  int seqlen_kv, num_blocks;
  bool is_causal;

  DEVICE int block_tiles() const { return tiles_of(blocks.count * block_kv.value); }
  DEVICE int num_tiles() const {
    return band.num_tiles() + block_tiles() + tiles_of(columns.count);
  }
  DEVICE bool is_of_band(int tile) const { return tile < band.num_tiles(); }

  // The key in place n of a tile.
  DEVICE int position(int tile, int n) const {
    int before = band.num_tiles();
    if (tile < before) return band.position(tile, n);
    const int slot = (tile - before) * kTileKeys + n;
    before = block_tiles() * kTileKeys;
    return slot < before ? position_in_blocks(slot) : position_in_columns(slot - before);
  }

  DEVICE int position_in_blocks(int slot) const {
    const int entry = block_kv.divide(slot);
    if (entry >= blocks.count) return kNoKey;
    const int block = load(blocks.indices + entry);
    if (static_cast<uint32_t>(block) >= static_cast<uint32_t>(num_blocks)) return kNoKey;
    const int j = block * block_kv.value + slot - entry * block_kv.value;
    return j < seqlen_kv ? j : kNoKey;
  }

  DEVICE int position_in_columns(int slot) const {
    if (slot >= columns.count) return kNoKey;
    const int j = load(columns.indices + slot);
    if (static_cast<uint32_t>(j) >= static_cast<uint32_t>(seqlen_kv)) return kNoKey;
    return is_in_blocks(j) ? kNoKey : j;
  }

  DEVICE bool is_in_blocks(int j) const {
    const int block = block_kv.divide(j);
    int low = 0, high = blocks.count;
    while (low < high) {
      const int middle = (low + high) / 2;
      const int found = load(blocks.indices + middle);
      if (found == block) return true;
      if (found < block) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return false;
  }

  // Whether the row at position p sees key j in a tile.
  DEVICE bool sees(int p, int j, bool in_band) const {
    return j < seqlen_kv && (!is_causal || j <= p) && band.contains(p, j) == in_band;
  }

  // Whether all rows see all keys of a tile, so that none need be hidden. The positions of its keys
  // lie in shared memory.
  DEVICE bool is_open(int tile, uint32_t positions) const {
    const int in_blocks = (tile - band.num_tiles()) * kTileKeys;
    const bool in_band = in_blocks < 0;
    if (!in_band) {
      if (tile >= band.num_tiles() + block_tiles()) return false;
      // No entry between the first key's and the last key's.
      if (block_kv.divide(in_blocks + kTileKeys - 1) > block_kv.divide(in_blocks) + 1) return false;
    }
    const int first = load_shared<int>(positions);
    const int last = load_shared<int>(positions + (kTileKeys - 1) * 4);
    if (first == kNoKey || last == kNoKey || (is_causal && last > rows.first)) return false;
    if (in_band) {
      return last < band.sink ||
             (rows.last - first < band.window && last - rows.first < band.window);
    }
    const bool none_in_window =
        band.window == 0 || rows.first - last >= band.window || first - rows.last >= band.window;
    return first >= band.sink && none_in_window;
  }
};

template <class Arguments>
DEVICE Walk walk_of(const Arguments& arguments, int batch, int head, int row, const RowSpan& rows) {
  Walk walk;
  walk.rows = rows;
  walk.band = band_of(arguments, head, rows);
  walk.block_kv = arguments.block_kv;
  walk.seqlen_kv = arguments.seqlen_kv;
  walk.num_blocks = ceil_div(arguments.seqlen_kv, arguments.block_kv.value);
  walk.is_causal = arguments.is_causal;
  walk.blocks = list_of(arguments.blocks, batch, head, row, arguments.block_kv.value,
                        walk.num_blocks, rows.key_end);
  walk.columns = list_of(arguments.columns, batch, head, row, 1, arguments.seqlen_kv, rows.key_end);
  return walk;
}

}  // namespace sparse_attn::cuda
