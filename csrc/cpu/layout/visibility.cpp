#include "cpu/layout/visibility.h"

#include <algorithm>

namespace sparse_attn::cpu {

namespace {

// Calls f with the rules of each run of rows in the tile that share all index lists, and with the
// run's first row, counted from the tile's.
template <class F>
void for_each_rules(const AttentionParams& params, const TileIndex& tile, F f) {
  for_each_run(params, tile.row, tile.row + tile.rows, [&](int64_t row, int64_t rows) {
    f(Rules(params, {tile.batch, tile.head, row, rows}), row - tile.row);
  });
}

// The keys of each granule of a key tile that sink, blocks and columns name.
void find_listed(const Rules& rules, int64_t first_key, uint32_t* granules) {
  const int64_t end_key = first_key + kKeyTile;
  const auto add = [&](int64_t begin, int64_t end) {
    begin = std::max(begin, first_key);
    end = std::min(end, end_key);
    for (int64_t k = begin / kGranule * kGranule; k < end; k += kGranule) {
      granules[(k - first_key) / kGranule] |= range_bits(begin, end, k);
    }
  };
  std::fill(granules, granules + kKeyTileGranules, 0);
  add(0, rules.sink());
  const IndexList &blocks = rules.blocks(), &columns = rules.columns();
  const int64_t first_block = first_key / rules.block_size();
  for (const int32_t* i = blocks.lower_bound(first_block); i != blocks.end; ++i) {
    const KeyRange block = rules.block(*i);
    if (block.begin >= end_key) break;
    add(block.begin, block.end);
  }
  for (const int32_t* i = columns.lower_bound(first_key); i != columns.end && *i < end_key; ++i) {
    add(*i, *i + int64_t{1});
  }
}

enum class Seen { kNothing, kSome, kAll };

// What the rows see of the granule at `first_key`, together; kSome may still be nothing.
Seen granule_seen(const Rules& rules, int64_t first_key, uint32_t listed) {
  const KeyRange granule = {first_key, first_key + kGranule};
  const bool in_window = rules.has_window() &&
                         granule.end > rules.window_at(rules.first_position()).begin &&
                         first_key < rules.window_at(rules.last_position()).end;
  if ((listed == 0 && !in_window) || first_key >= rules.limit()) return Seen::kNothing;
  if (granule.end > rules.key_limit(rules.first_position())) return Seen::kSome;
  if (listed == kAllKeys) return Seen::kAll;
  return rules.has_window() && rules.all_windows_hold(granule) ? Seen::kAll : Seen::kSome;
}

}  // namespace

void mark_key_tiles(const AttentionParams& params, const TileIndex& tile, uint64_t* bits) {
  for_each_rules(params, tile, [&](const Rules& rules, int64_t) {
    const int64_t limit = rules.limit();
    const auto mark = [&](const KeyRange& keys) {
      const int64_t end = std::min(keys.end, limit);
      if (keys.begin >= end) return;
      for (int64_t t = keys.begin / kKeyTile; t <= (end - 1) / kKeyTile; ++t) {
        bits[t / 64] |= uint64_t{1} << t % 64;
      }
    };
    mark({0, rules.sink()});
    mark(rules.window());
    const IndexList &blocks = rules.blocks(), &columns = rules.columns();
    for (const int32_t* i = blocks.begin; i != blocks.end; ++i) mark(rules.block(*i));
    for (const int32_t* i = columns.begin; i != columns.end; ++i) mark({*i, *i + int64_t{1}});
  });
}

void find_visibility(const AttentionParams& params, const TileIndex& tile, int64_t first_key,
                     Visibility& found) {
  bool any[kKeyTileGranules] = {}, all[kKeyTileGranules];
  std::fill(all, all + kKeyTileGranules, true);
  for_each_rules(params, tile, [&](const Rules& rules, int64_t row) {
    const bool alone = rules.rows() == tile.rows;  // words are not needed where all rows agree
    uint32_t listed[kKeyTileGranules];
    find_listed(rules, first_key, listed);
    for (int g = 0; g < kKeyTileGranules; ++g) {
      const int64_t key = first_key + g * kGranule;
      uint32_t* words = found.words[g] + row;
      const Seen seen = granule_seen(rules, key, listed[g]);
      if (seen == Seen::kSome) {
        rules.row_words(key, listed[g], words);
        any[g] |= std::any_of(words, words + rules.rows(), [](uint32_t x) { return x != 0; });
      } else {
        const bool visible = seen == Seen::kAll;
        if (!alone) std::fill(words, words + rules.rows(), visible ? kAllKeys : 0);
        any[g] |= visible;
      }
      all[g] &= seen == Seen::kAll;
    }
  });
  found.count = 0;
  for (int g = 0; g < kKeyTileGranules; ++g) {
    if (!any[g]) continue;
    uint32_t* words = found.words[g];
    if (!all[g]) std::fill(words + tile.rows, words + kMaxRows, 0);
    found.parts[found.count++] =
        all[g] ? Visibility::Part{g} : Visibility::Part{g, words, seeing_rows(words, tile.rows)};
  }
}

void find_busy_rows(const AttentionParams& params, const TileIndex& tile, bool* busy) {
  for_each_rules(params, tile, [&](const Rules& rules, int64_t row) {
    for (int64_t r = 0; r < rules.rows(); ++r) busy[row + r] = rules.row_sees(r);
  });
}

}  // namespace sparse_attn::cpu
