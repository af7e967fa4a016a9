// The search of HiP for one query block.
#pragma once

#include <algorithm>
#include <bit>
#include <functional>
#include <span>
#include <vector>

#include "cpu/kernels/hip_kernel.h"
#include "cpu/runtime/aligned_buffer.h"
#include "cpu/search/hip.h"
#include "cpu/search/hip_keys.h"

namespace sparse_attn::cpu {

// A run of key blocks, counted from the first one that is searched, and how two of them rank.
struct Node {
  int32_t first;
  uint32_t first_rank, centre_rank;
};

// Floats in the order of their values; NaN comes first.
inline uint32_t rank_of(float x) {
  if (x != x) return 0;
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);  // no negative zero
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Whether blocks are runs of keys that the kernel scores as a whole.
inline bool has_runs(const HipParams& params, const HipKernel& kernel) {
  const int64_t sampled = ceil_div(params.block_k - params.stride_k / 2, params.stride_k);
  return kernel.score_runs != nullptr && sampled == kHipRun && params.head_dim % 32 == 0;
}

// What the searches of one thread use one after the other.
struct SearchScratch {
  std::vector<const void*> pointers;
  std::vector<const std::byte*> runs;
  std::vector<float> scores;
  std::vector<float*> score_lists;
  std::vector<const std::byte*> queries;
  std::vector<uint32_t> ranks;
  std::vector<Node> halves;
};

// The search of one query block: for each size of its nodes from first_size() on, rank() all of
// them, part by part, then descend(); at last write().
class TreeSearch {
 public:
  TreeSearch(const HipParams& params, const HipKernel& kernel, SearchScratch& scratch)
      : params_(params), kernel_(kernel), scratch_(scratch) {}

  void begin(int64_t b, int64_t head, int64_t row, const SampledKeys& keys) {
    const int64_t first_row = row * params_.block_q;
    int64_t last_end = params_.seqlen_kv;  // of what the last row sees
    if (params_.is_causal) {
      const int64_t off = params_.seqlen_kv - params_.seqlen_q;
      last_end = std::min(first_row + params_.block_q + off, last_end);
    }
    end_ = last_end - (params_.is_causal ? params_.window : 0);
    first_block_ = params_.sink / params_.block_k;
    num_blocks_ = static_cast<int32_t>(
        std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, end_), params_.block_k) - first_block_));
    list_ = (b * params_.num_heads + head) * params_.num_rows() + row;
    nodes_.clear();
    next_ = first_size_ = 0;
    if (num_blocks_ <= params_.slots) return;
    prepare_queries(b, head, first_row);
    set_origins(keys, last_end);
    keys_ = &keys;
    first_size_ = 1;
    while (ceil_div(num_blocks_, first_size_) > kMostNodes * params_.slots) first_size_ *= 2;
    for (int32_t first = 0; first < num_blocks_; first += first_size_) {
      nodes_.push_back({first, 0, 0});
    }
  }

  int32_t num_blocks() const { return num_blocks_; }
  int32_t first_size() const { return first_size_; }  // 0 if all blocks are kept

  // Ranks the nodes that begin before block `stop`, and that were not ranked before.
  void rank(int32_t size, int64_t stop) {
    const size_t begin = next_;
    while (next_ < nodes_.size() && nodes_[next_].first < stop) ++next_;
    const std::span<Node> nodes = std::span(nodes_).subspan(begin, next_ - begin);
    if (nodes.empty()) return;
    if (size == first_size_ && has_firsts()) {
      rank_blocks(nodes, [](const Node& node) { return node.first; }, &Node::first_rank);
    }
    if (size > 1 || !has_firsts()) {
      rank_blocks(
          nodes, [&](const Node& node) { return std::min(node.first + size / 2, num_blocks_ - 1); },
          &Node::centre_rank);
    }
  }

  // What searches share that look at the same first nodes.
  bool begins_as(const TreeSearch& other) const {
    return first_size_ == other.first_size_ && num_rows_ == other.num_rows_;
  }
  int64_t num_rows() const { return num_rows_; }
  const std::byte* queries() const { return queries_.data(); }

  // Ranks the first nodes by the scores of the blocks `offset` behind their beginnings.
  void rank_first(int32_t offset, const float* scores) {
    const auto rank = offset > 0 || !has_firsts() ? &Node::centre_rank : &Node::first_rank;
    for (Node& node : nodes_) {
      const int32_t block = node.first + offset;
      if (block < num_blocks_ && keys_->whole(block, end_)) {
        node.*rank = rank_of(*scores++);
      } else {  // of the last node
        const auto last = [&](const Node&) { return std::min(block, num_blocks_ - 1); };
        rank_blocks({&node, 1}, last, rank);
      }
    }
    next_ = nodes_.size();
  }

  // Keeps the best nodes and splits them.
  void descend(int32_t size) {
    keep_best();
    if (size > 1) split(size / 2);
    next_ = 0;
  }

  void write() const {
    const int64_t count = std::min<int64_t>(params_.slots, num_blocks_);
    int32_t* indices = params_.indices + list_ * params_.width;
    params_.counts[list_] = static_cast<int32_t>(count);
    for (int64_t j = 0; j < count; ++j) {
      indices[j] = static_cast<int32_t>(first_block_ + (nodes_.empty() ? j : nodes_[j].first));
    }
    std::fill(indices + count, indices + params_.width, 0);
  }

 private:
  static constexpr int64_t kMostNodes = 8;  // at the start, for each that is kept

  bool has_firsts() const { return params_.representatives > 1; }

  const std::byte* byte_offset(const void* base, int64_t elements) const {
    return static_cast<const std::byte*>(base) + elements * element_size(params_.dtype);
  }

  void prepare_queries(int64_t b, int64_t head, int64_t first_row) {
    const int64_t end = std::min(first_row + params_.block_q, params_.seqlen_q);
    std::vector<const void*>& rows = scratch_.pointers;
    rows.clear();
    const auto sample = [&](int64_t row) {
      rows.push_back(byte_offset(
          params_.q,
          b * params_.q_stride.batch + head * params_.q_stride.head + row * params_.q_stride.row));
    };
    if (params_.strict) {
      sample(first_row);
    } else {
      int64_t row = first_row + params_.stride_q - 1;
      for (; row < end - 1; row += params_.stride_q) sample(row);
      sample(end - 1);
    }
    num_rows_ = static_cast<int64_t>(rows.size());
    queries_.reserve(kernel_.query_bytes(num_rows_, params_.head_dim));
    kernel_.prepare_queries(rows.data(), num_rows_, params_.head_dim, queries_.data());
  }

  // A row's products are counted from the greatest one with a key that needs no search.
  void set_origins(const SampledKeys& keys, int64_t last_end) {
    if (num_rows_ == 1 || end_ >= last_end) return;
    std::vector<const void*>& near = scratch_.pointers;
    near.clear();
    for (int64_t j = 0; j < std::min(params_.sink, end_); ++j) near.push_back(keys.key(j));
    for (int64_t j = end_; j < last_end; ++j) near.push_back(keys.key(j));
    near.resize(ceil_div(std::ssize(near), kHipKeys) * kHipKeys, near.back());
    kernel_.set_origins(queries_.data(), num_rows_, params_.head_dim, near.data(),
                        std::ssize(near));
  }

  // Ranks one block of each node: its largest product of a sampled row and a sampled key.
  void rank_blocks(std::span<Node> nodes, auto block_of, uint32_t Node::* rank) {
    if (!has_runs(params_, kernel_)) return rank_by_keys(nodes, block_of, rank);
    std::vector<const std::byte*>& runs = scratch_.runs;
    runs.clear();
    for (const Node& node : nodes) {
      const int64_t block = block_of(node);
      if (!keys_->whole(block, end_)) break;  // only the last one may not be
      runs.push_back(keys_->block(block));
    }
    const size_t count = runs.size();
    scratch_.scores.resize(count);
    const std::byte* queries = queries_.data();
    float* scores = scratch_.scores.data();
    kernel_.score_runs(&queries, 1, num_rows_, params_.head_dim, runs.data(),
                       static_cast<int64_t>(count), keys_->row_bytes(), &scores);
    for (size_t i = 0; i < count; ++i) nodes[i].*rank = rank_of(scratch_.scores[i]);
    if (count < nodes.size()) rank_by_keys(nodes.subspan(count), block_of, rank);
  }

  void rank_by_keys(std::span<Node> nodes, auto block_of, uint32_t Node::* rank) {
    std::vector<const void*>& keys = scratch_.pointers;
    keys.clear();
    const int64_t per_block = keys_->per_block(), row_bytes = keys_->row_bytes();
    for (const Node& node : nodes) {
      const int64_t block = block_of(node);
      if (keys_->whole(block, end_)) {
        const std::byte* key = keys_->block(block);
        for (int64_t i = 0; i < per_block; ++i) keys.push_back(key + i * row_bytes);
      } else {
        for (int64_t i = 0; i < per_block; ++i) keys.push_back(keys_->key(block, i, end_));
      }
    }
    const int64_t count = std::ssize(keys);
    keys.resize(ceil_div(count, kHipKeys) * kHipKeys, keys.back());
    scratch_.scores.resize(keys.size());
    kernel_.score(queries_.data(), num_rows_, params_.head_dim, keys.data(), count,
                  scratch_.scores.data());
    const float* score = scratch_.scores.data();
    for (Node& node : nodes) {
      node.*rank = rank_of(*std::max_element(score, score + per_block));
      score += per_block;
    }
  }

  // Leaves the nodes of highest rank; of equal ones the first.
  void keep_best() {
    std::vector<uint32_t>& ranks = scratch_.ranks;
    ranks.clear();
    for (const Node& node : nodes_) ranks.push_back(rank_of_node(node));
    const auto last = ranks.begin() + params_.slots - 1;
    std::nth_element(ranks.begin(), last, ranks.end(), std::greater<>());
    const uint32_t lowest = *last;
    int64_t ties = std::count(ranks.begin(), last + 1, lowest);
    std::erase_if(nodes_, [&](const Node& node) {
      const uint32_t rank = rank_of_node(node);
      return rank < lowest || (rank == lowest && ties-- <= 0);
    });
  }

  uint32_t rank_of_node(const Node& node) const {
    return has_firsts() ? std::max(node.first_rank, node.centre_rank) : node.centre_rank;
  }

  // The second half of a node begins at its centre.
  void split(int32_t half) {
    std::vector<Node>& halves = scratch_.halves;
    halves.clear();
    for (const Node& node : nodes_) {
      halves.push_back({node.first, node.first_rank, 0});
      if (node.first + half < num_blocks_) {
        halves.push_back({node.first + half, node.centre_rank, 0});
      }
    }
    nodes_.assign(halves.begin(), halves.end());
  }

  const HipParams& params_;
  const HipKernel& kernel_;
  SearchScratch& scratch_;
  int64_t end_ = 0, first_block_ = 0;  // of the searched keys
  int64_t num_rows_ = 0;               // sampled ones
  int64_t list_ = 0;                   // the one to write
  int32_t num_blocks_ = 0, first_size_ = 0;
  size_t next_ = 0;  // the first node that has no rank
  const SampledKeys* keys_ = nullptr;
  AlignedBuffer queries_;
  std::vector<Node> nodes_;
};

}  // namespace sparse_attn::cpu
