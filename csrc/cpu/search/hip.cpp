#include "cpu/search/hip.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <ranges>
#include <span>
#include <vector>

#include "cpu/isa/kernels.h"
#include "cpu/runtime/aligned_buffer.h"
#include "cpu/search/hip_keys.h"
#include "cpu/search/tree_search.h"
#include "integers.h"

namespace sparse_attn::cpu {

namespace {

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
  SearchScratch scratch_;
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
