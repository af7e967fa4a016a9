#include "cpu/search/hip.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <deque>
#include <functional>
#include <ranges>
#include <span>
#include <vector>

#include "cpu/isa/kernels.h"
#include "cpu/runtime/aligned_buffer.h"
#include "cpu/search/hip_keys.h"
#include "integers.h"

namespace sparse_attn::cpu {

namespace {

// A run of key blocks, counted from the first one that is searched, and how two of them rank.
struct Node {
  int32_t first;
  uint32_t first_rank, centre_rank;
};

// Floats in the order of their values; NaN comes first.
uint32_t rank_of(float x) {
  if (x != x) return 0;
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);  // no negative zero
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Whether blocks are runs of keys that the kernel scores as a whole.
bool has_runs(const HipParams& params, const HipKernel& kernel) {
  const int64_t sampled = ceil_div(params.block_k - params.stride_k / 2, params.stride_k);
  return kernel.score_runs != nullptr && sampled == kHipRun && params.head_dim % 32 == 0;
}

// What the searches of one thread use one after the other.
struct Scratch {
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
  TreeSearch(const HipParams& params, const HipKernel& kernel, Scratch& scratch)
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
  Scratch& scratch_;
  int64_t end_ = 0, first_block_ = 0;  // of the searched keys
  int64_t num_rows_ = 0;               // sampled ones
  int64_t list_ = 0;                   // the one to write
  int32_t num_blocks_ = 0, first_size_ = 0;
  size_t next_ = 0;  // the first node that has no rank
  const SampledKeys* keys_ = nullptr;
  AlignedBuffer queries_;
  std::vector<Node> nodes_;
};

// Searches of one KV head that descend together: at each size of the nodes, all of them look at one
// part of the keys, which stays in the cache meanwhile, before they look at the next.
class SearchGroup {
 public:
  SearchGroup(const HipParams& params, const HipKernel& kernel, int64_t most)
      : params_(params), kernel_(kernel) {
    for (int64_t i = 0; i < most; ++i) searches_.emplace_back(params, kernel, scratch_);
    const int64_t key_bytes = params.head_dim * element_size(params.dtype);
    const int64_t sampled = ceil_div(params.block_k - params.stride_k / 2, params.stride_k);
    blocks_in_cache_ = std::max<int64_t>(1, kCachedKeys / (key_bytes * sampled));
  }

  // Task i of a KV head is head i % (its query heads) of one query block after the other.
  void run(int64_t b, int64_t kv_head, int64_t first_task, int64_t stop_task,
           const SampledKeys& keys) {
    const int64_t heads = params_.num_heads / params_.num_kv_heads;
    auto searches = searches_ | std::views::take(stop_task - first_task);
    int32_t size = 0, num_blocks = 0;
    for (int64_t i = first_task; TreeSearch& search : searches) {
      search.begin(b, kv_head * heads + i % heads, i / heads, keys);
      size = std::max(size, search.first_size());
      num_blocks = std::max(num_blocks, search.num_blocks());
      ++i;
    }
    for (; size > 0; size /= 2) {
      if (has_runs(params_, kernel_)) rank_first_nodes(searches, size, keys);
      const int64_t step = size * blocks_in_cache_;
      for (int64_t stop = step; stop < num_blocks + step; stop += step) {
        for (TreeSearch& search : searches) {
          if (size <= search.first_size()) search.rank(size, stop);
        }
      }
      for (TreeSearch& search : searches) {
        if (size <= search.first_size()) search.descend(size);
      }
    }
    for (const TreeSearch& search : searches) search.write();
  }

 private:
  static constexpr int64_t kCachedKeys = 1 << 19;  // bytes

  // The searches that begin with nodes of this size look at the same blocks.
  void rank_first_nodes(auto searches, int32_t size, const SampledKeys& keys) {
    std::vector<TreeSearch*> alike;
    for (TreeSearch& search : searches) {
      if (search.first_size() != size) continue;
      if (!alike.empty() && !search.begins_as(*alike[0])) {
        rank_alike(alike, size, keys);
        alike.clear();
      }
      alike.push_back(&search);
    }
    if (!alike.empty()) rank_alike(alike, size, keys);
  }

  void rank_alike(std::span<TreeSearch*> searches, int32_t size, const SampledKeys& keys) {
    if (params_.representatives > 1) rank_alike(searches, size, 0, keys);
    if (params_.representatives == 1 || size > 1) rank_alike(searches, size, size / 2, keys);
  }

  void rank_alike(std::span<TreeSearch*> searches, int32_t size, int32_t offset,
                  const SampledKeys& keys) {
    int64_t num_blocks = 0;
    for (const TreeSearch* search : searches) {
      num_blocks = std::max<int64_t>(num_blocks, search->num_blocks());
    }
    std::vector<const std::byte*>& runs = scratch_.runs;
    runs.clear();
    for (int64_t n = offset; n < num_blocks && keys.whole(n, params_.seqlen_kv); n += size) {
      runs.push_back(keys.block(n));
    }
    const int64_t count = std::ssize(runs);
    first_scores_.resize(count * searches.size());
    std::vector<const std::byte*>& queries = scratch_.queries;
    queries.clear();
    for (const TreeSearch* search : searches) queries.push_back(search->queries());
    std::vector<float*>& lists = scratch_.score_lists;
    lists.resize(searches.size());
    for (int64_t begin = 0; begin < count; begin += blocks_in_cache_) {
      for (size_t i = 0; i < lists.size(); ++i) lists[i] = first_scores_.data() + i * count + begin;
      kernel_.score_runs(queries.data(), std::ssize(queries), searches[0]->num_rows(),
                         params_.head_dim, runs.data() + begin,
                         std::min(blocks_in_cache_, count - begin), keys.row_bytes(), lists.data());
    }
    for (size_t i = 0; i < lists.size(); ++i) {
      searches[i]->rank_first(offset, first_scores_.data() + i * count);
    }
  }

  const HipParams& params_;
  const HipKernel& kernel_;
  std::vector<float> first_scores_;
  Scratch scratch_;
  std::deque<TreeSearch> searches_;
  int64_t blocks_in_cache_ = 1;
};

// All threads copy the keys of all heads.
void copy_keys(std::span<SampledKeys> keys, const Parallel& parallel, AlignedBuffer& copies) {
  const int64_t head_bytes = keys[0].copy_bytes(), num_blocks = keys[0].num_blocks();
  copies.reserve(head_bytes * std::ssize(keys));
  for (size_t i = 0; i < keys.size(); ++i) keys[i].read_from(copies.data() + i * head_bytes);
  const int64_t all = num_blocks * std::ssize(keys), threads = parallel.num_threads;
  parallel.run(threads, [&](int64_t thread) {
    for (int64_t i = all * thread / threads; i < all * (thread + 1) / threads; ++i) {
      keys[i / num_blocks].copy_block(i % num_blocks);
    }
  });
}

}  // namespace

void hip_select(const HipParams& params, Isa isa, const Parallel& parallel) {
  const int64_t rows = params.num_rows();
  const int64_t num_tasks = params.batch * params.num_heads * rows;
  if (num_tasks == 0) return;
  const int64_t block_rows = std::min(params.block_q, params.seqlen_q);
  const int64_t sampled = params.strict ? 1 : ceil_div(block_rows, params.stride_q);
  const HipKernel& kernel = find_hip_kernel(isa, params.dtype, sampled);
  const int64_t num_heads = params.batch * params.num_kv_heads;
  const int64_t tasks = params.num_heads / params.num_kv_heads * rows;  // of a KV head
  std::vector<SampledKeys> keys;
  for (int64_t head = 0; head < num_heads; ++head) {
    keys.emplace_back(params, head / params.num_kv_heads, head % params.num_kv_heads);
  }
  AlignedBuffer copies;
  constexpr int64_t kFewTasks = 16;
  if (tasks > kFewTasks && has_runs(params, kernel)) copy_keys(keys, parallel, copies);
  constexpr int64_t kMostTogether = 64, kGroupsPerThread = 4;
  const int64_t together = std::clamp<int64_t>(
      num_heads * tasks / (kGroupsPerThread * parallel.num_threads), 1, kMostTogether);
  const int64_t groups = ceil_div(tasks, together);  // of a KV head
  std::atomic<int64_t> next_group{0};
  const auto work = [&](int64_t) {  // the last query blocks, which see most, come first
    SearchGroup group(params, kernel, std::min(together, tasks));
    const uint32_t saved = kernel.enter();
    for (int64_t i = next_group++; i < num_heads * groups; i = next_group++) {
      const int64_t first = (groups - 1 - i / num_heads) * together, head = i % num_heads;
      group.run(head / params.num_kv_heads, head % params.num_kv_heads, first,
                std::min(first + together, tasks), keys[head]);
    }
    kernel.leave(saved);
  };
  parallel.run(std::min(num_heads * groups, parallel.num_threads), work);
}

}  // namespace sparse_attn::cpu
