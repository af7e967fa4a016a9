#include "cpu/layout/rules.h"

#include "cpu/layout/granule.h"

namespace sparse_attn::cpu {

namespace {

// Which of the `entries` that the heads share belongs to a head.
int64_t entry_of(const AttentionParams& params, int64_t head, int64_t entries) {
  return head / (params.num_heads / entries);
}

int32_t value_of(const AttentionParams& params, const PerHead& values, int64_t head) {
  return values.data[entry_of(params, head, values.heads)];
}

IndexList find_list(const AttentionParams& params, const IndexLists& lists, const TileIndex& run,
                    int64_t rows_per_list) {
  if (!lists.present()) return {};
  const int64_t batch = lists.batch == 1 ? 0 : run.batch;
  const int64_t head = entry_of(params, run.head, lists.heads);
  const int64_t i = (batch * lists.heads + head) * lists.rows + run.row / rows_per_list;
  const int32_t* begin = lists.indices + i * lists.width;
  return {begin, begin + lists.counts[i]};
}

}  // namespace

int64_t list_rows(const AttentionParams& params) {
  int64_t rows = std::max<int64_t>(1, params.seqlen_q);
  if (params.columns.present()) rows = std::min(rows, params.block_q * params.column_group);
  if (params.blocks.present()) rows = std::min(rows, params.block_q);
  return rows;
}

bool have_same_rules(const AttentionParams& params, int64_t head, int64_t other) {
  const auto same_value = [&](const PerHead& x) {
    return value_of(params, x, head) == value_of(params, x, other);
  };
  const auto same_list = [&](const IndexLists& x) {
    return !x.present() || entry_of(params, head, x.heads) == entry_of(params, other, x.heads);
  };
  return same_value(params.sink) && same_value(params.window) && same_list(params.blocks) &&
         same_list(params.columns);
}

Rules::Rules(const AttentionParams& params, const TileIndex& run)
    : params_(params),
      rows_(run.rows),
      first_(run.row + params.seqlen_kv - params.seqlen_q),
      window_(value_of(params, params.window, run.head)),
      sink_(window_ < 0 ? params.seqlen_kv : value_of(params, params.sink, run.head)) {
  if (window_ < 0) return;
  blocks_ = find_list(params, params.blocks, run, params.block_q);
  columns_ = find_list(params, params.columns, run, params.block_q * params.column_group);
}

KeyRange Rules::window() const {
  if (window_ <= 0) return {};
  return {std::max<int64_t>(0, first_ - window_ + 1), std::min(limit(), last_position() + window_)};
}

void Rules::row_masks(const int32_t* positions, int count, uint32_t always, uint32_t window,
                      uint32_t* masks) const {
  int num_causal = params_.is_causal ? 0 : count, num_before = 0, num_until = 0;
  for (int64_t r = 0; r < rows_; ++r) {
    const int64_t p = first_ + r;
    while (num_causal < count && positions[num_causal] <= p) ++num_causal;
    const uint32_t causal = low_bits(num_causal);
    masks[r] = always & causal;
    if (window == 0) continue;
    while (num_before < count && positions[num_before] <= p - window_) ++num_before;
    while (num_until < count && positions[num_until] < p + window_) ++num_until;
    masks[r] |= window & causal & low_bits(num_until) & ~low_bits(num_before);
  }
}

void Rules::row_words(int64_t first_key, uint32_t listed, uint32_t* words) const {
  for (int64_t r = 0; r < rows_; ++r) {
    const int64_t p = first_ + r;
    uint32_t word = listed;
    if (window_ > 0) word |= range_bits(p - window_ + 1, p + window_, first_key);
    words[r] = word & low_bits(key_limit(p) - first_key);
  }
}

bool Rules::row_sees(int64_t r) const {
  const int64_t p = first_ + r, limit = key_limit(p);
  if (limit <= 0) return false;
  if (sink_ > 0) return true;
  if (window_ > 0 && p - window_ + 1 < limit && p + window_ > 0) return true;
  if (!blocks_.empty() && block(*blocks_.begin).begin < limit) return true;
  return !columns_.empty() && *columns_.begin < limit;
}

}  // namespace sparse_attn::cpu
