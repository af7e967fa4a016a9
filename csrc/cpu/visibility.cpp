#include "visibility.h"

#include <algorithm>

namespace sparse_attn::cpu {

namespace {

constexpr uint32_t kAll = ~uint32_t{0};

// The keys of [begin, end) among the 32 keys from `origin` on.
uint32_t range_bits(int64_t begin, int64_t end, int64_t origin) {
  return low_bits(end - origin) & ~low_bits(begin - origin);
}

struct List {
  const int32_t* begin = nullptr;
  const int32_t* end = nullptr;

  bool empty() const { return begin == end; }
  const int32_t* lower_bound(int64_t value) const { return std::lower_bound(begin, end, value); }
};

// The rules for consecutive rows that share all index lists.
class Rules {
 public:
  Rules(const AttentionParams& params, int64_t batch, int64_t head, int64_t row, int64_t rows)
      : params_(params), rows_(rows), first_(row + params.seqlen_kv - params.seqlen_q) {
    last_ = first_ + rows - 1;
    window_ = per_head(params.window, head);
    sink_ = window_ < 0 ? params.seqlen_kv : per_head(params.sink, head);
    if (window_ < 0) return;
    blocks_ = list(params.blocks, batch, head, row / params.block_q);
    columns_ = list(params.columns, batch, head, row / params.block_q / params.column_group);
  }

  int64_t rows() const { return rows_; }

  void mark_key_tiles(uint64_t* bits) const {
    const int64_t limit = key_limit(last_);
    const auto mark = [&](int64_t begin, int64_t end) {
      end = std::min(end, limit);
      if (begin >= end) return;
      for (int64_t t = begin / kKeyTile; t <= (end - 1) / kKeyTile; ++t) {
        bits[t / 64] |= uint64_t{1} << t % 64;
      }
    };
    mark(0, sink_);
    if (window_ > 0) mark(std::max<int64_t>(0, first_ - window_ + 1), last_ + window_);
    for (const int32_t* i = blocks_.begin; i != blocks_.end; ++i) {
      mark(*i * params_.block_kv, (*i + 1) * params_.block_kv);
    }
    for (const int32_t* i = columns_.begin; i != columns_.end; ++i) mark(*i, *i + int64_t{1});
  }

  // The keys of each granule of a key tile that sink, blocks and columns name.
  void find_listed(int64_t first_key, uint32_t* granules) const {
    const int64_t end_key = first_key + kKeyTile;
    const auto add = [&](int64_t begin, int64_t end) {
      begin = std::max(begin, first_key);
      end = std::min(end, end_key);
      for (int64_t k = begin / kGranule * kGranule; k < end; k += kGranule) {
        granules[(k - first_key) / kGranule] |= range_bits(begin, end, k);
      }
    };
    std::fill(granules, granules + kKeyTileGranules, 0);
    add(0, sink_);
    const int64_t size = params_.block_kv;
    for (const int32_t* i = blocks_.lower_bound(first_key / size);
         i != blocks_.end && *i * size < end_key; ++i) {
      add(*i * size, (*i + 1) * size);
    }
    for (const int32_t* i = columns_.lower_bound(first_key); i != columns_.end && *i < end_key;
         ++i) {
      add(*i, *i + int64_t{1});
    }
  }

  enum class Seen { kNothing, kSome, kAll };

  // What the rows see of the granule at `first_key`, together; kSome may still be nothing.
  Seen granule_seen(int64_t first_key, uint32_t listed) const {
    const int64_t last_key = first_key + kGranule - 1;
    const bool in_window =
        window_ > 0 && last_key > first_ - window_ && first_key < last_ + window_;
    if ((listed == 0 && !in_window) || first_key >= key_limit(last_)) return Seen::kNothing;
    if (last_key >= key_limit(first_)) return Seen::kSome;
    if (listed == kAll) return Seen::kAll;
    const bool all_in_window =
        window_ > 0 && last_ - first_key < window_ && last_key - first_ < window_;
    return all_in_window ? Seen::kAll : Seen::kSome;
  }

  // Word r: the keys from `first_key` on that row r sees.
  void find_words(int64_t first_key, uint32_t listed, uint32_t* words) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t p = first_ + r;
      uint32_t word = listed;
      if (window_ > 0) word |= range_bits(p - window_ + 1, p + window_, first_key);
      words[r] = word & low_bits(key_limit(p) - first_key);
    }
  }

  // Whether row r sees any key.
  bool row_sees(int64_t r) const {
    const int64_t p = first_ + r, limit = key_limit(p);
    if (limit <= 0) return false;
    if (sink_ > 0) return true;
    if (window_ > 0 && p - window_ + 1 < limit && p + window_ > 0) return true;
    if (!blocks_.empty() && *blocks_.begin * params_.block_kv < limit) return true;
    return !columns_.empty() && *columns_.begin < limit;
  }

 private:
  int64_t per_head(const PerHead& values, int64_t head) const {
    return values.data[head / (params_.num_heads / values.heads)];
  }

  List list(const IndexLists& lists, int64_t batch, int64_t head, int64_t row) const {
    if (!lists.present()) return {};
    const int64_t b = lists.batch == 1 ? 0 : batch;
    const int64_t h = head / (params_.num_heads / lists.heads);
    const int64_t i = (b * lists.heads + h) * lists.rows + row;
    const int32_t* begin = lists.indices + i * lists.width;
    return {begin, begin + lists.counts[i]};
  }

  // No row up to position p sees a key from here on.
  int64_t key_limit(int64_t p) const {
    return params_.is_causal ? std::min(params_.seqlen_kv, p + 1) : params_.seqlen_kv;
  }

  const AttentionParams& params_;
  int64_t rows_, first_, last_, window_ = 0, sink_ = 0;
  List blocks_, columns_;
};

// Calls f with the rules of each run of rows in the tile that share all index lists, and with the
// run's first row, counted from the tile's.
template <class F>
void for_each_run(const AttentionParams& params, const TileIndex& tile, F f) {
  const int64_t unit = list_rows(params);
  for (int64_t row = tile.row; row < tile.row + tile.rows;) {
    const int64_t end = std::min(tile.row + tile.rows, (row / unit + 1) * unit);
    f(Rules(params, tile.batch, tile.head, row, end - row), row - tile.row);
    row = end;
  }
}

}  // namespace

int64_t list_rows(const AttentionParams& params) {
  int64_t rows = std::max<int64_t>(1, params.seqlen_q);
  if (params.columns.present()) rows = std::min(rows, params.block_q * params.column_group);
  if (params.blocks.present()) rows = std::min(rows, params.block_q);
  return rows;
}

void mark_key_tiles(const AttentionParams& params, const TileIndex& tile, uint64_t* bits) {
  for_each_run(params, tile, [&](const Rules& rules, int64_t) { rules.mark_key_tiles(bits); });
}

void find_visibility(const AttentionParams& params, const TileIndex& tile, int64_t first_key,
                     Visibility& found) {
  bool any[kKeyTileGranules] = {}, all[kKeyTileGranules];
  std::fill(all, all + kKeyTileGranules, true);
  for_each_run(params, tile, [&](const Rules& rules, int64_t row) {
    const bool alone = rules.rows() == tile.rows;  // words are not needed where all rows agree
    uint32_t listed[kKeyTileGranules];
    rules.find_listed(first_key, listed);
    for (int g = 0; g < kKeyTileGranules; ++g) {
      const int64_t key = first_key + g * kGranule;
      uint32_t* words = found.words[g] + row;
      const Rules::Seen seen = rules.granule_seen(key, listed[g]);
      if (seen == Rules::Seen::kSome) {
        rules.find_words(key, listed[g], words);
        any[g] |= std::any_of(words, words + rules.rows(), [](uint32_t x) { return x != 0; });
      } else {
        const bool visible = seen == Rules::Seen::kAll;
        if (!alone) std::fill(words, words + rules.rows(), visible ? kAll : 0);
        any[g] |= visible;
      }
      all[g] &= seen == Rules::Seen::kAll;
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
  for_each_run(params, tile, [&](const Rules& rules, int64_t row) {
    for (int64_t r = 0; r < rules.rows(); ++r) busy[row + r] = rules.row_sees(r);
  });
}

}  // namespace sparse_attn::cpu
