#include "cpu/search/infinite_hip.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "cpu/isa/kernels.h"
#include "cpu/runtime/aligned_buffer.h"
#include "cpu/search/hip.h"
#include "integers.h"

namespace sparse_attn::cpu {

namespace {

// What is judged by the value is not read again: other threads may write into the lists.
int64_t read_once(const int32_t& x) { return __atomic_load_n(&x, __ATOMIC_RELAXED); }

// A query block of one sequence.
struct Block {
  int64_t batch, row;
};

class CandidateChunks {
 public:
  explicit CandidateChunks(const InfiniteHipParams& params) : params_(params) {
    const int64_t searched = params.seqlen_kv - params.sink - params.window;
    num_chunks_ = ceil_div(std::max<int64_t>(0, searched), params.chunk);
  }

  int64_t most() const {
    if (params_.listed_counts == nullptr) return num_chunks_;
    return params_.listed_width * (params_.parent / params_.chunk);
  }

  // The last key at which a search may begin.
  int64_t limit(const Block& block) const {
    const int64_t end = params_.seqlen_kv - params_.behind;
    if (!params_.is_causal) return end - 1;
    const int64_t off = params_.seqlen_kv - params_.seqlen_q;
    const int64_t limit = block.row * params_.block_q + off - params_.behind;
    return std::min(std::max<int64_t>(0, limit), end - 1);
  }

  // The chunks that are searched, in the order of the list.
  void find(const Block& block, int64_t group, std::vector<int32_t>& chunks) const {
    chunks.clear();
    const int64_t last = limit(block);
    const auto add = [&](int64_t chunk) {
      if (params_.sink + chunk * params_.chunk > last) return;
      chunks.push_back(static_cast<int32_t>(chunk));
    };
    if (params_.listed_counts == nullptr) {
      for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) add(chunk);
      return;
    }
    const int64_t list = (block.batch * params_.groups() + group) * params_.num_rows() + block.row;
    const int32_t* listed = params_.listed_indices + list * params_.listed_width;
    const int64_t count = std::min(read_once(params_.listed_counts[list]), params_.listed_width);
    const int64_t num_parents = ceil_div(params_.seqlen_kv, params_.parent);
    const int64_t parts = params_.parent / params_.chunk;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t parent = read_once(listed[i]);
      if (parent < 0 || parent >= num_parents) continue;
      for (int64_t part = 0; part < parts; ++part) add(parent * parts + part);
    }
  }

 private:
  const InfiniteHipParams& params_;
  int64_t num_chunks_;
};

// The binary search in a chunk, and the last key that it has chosen.
struct Search {
  int64_t left, right, key;
  float product, best;

  int64_t centre() const { return (left + right) / 2; }
  int64_t lower() const { return (left + centre()) / 2; }
  int64_t upper() const { return (centre() + right) / 2; }

  void choose(float lower_product, float upper_product, int64_t limit) {
    const bool go_left = lower_product > upper_product;
    key = go_left ? lower() : upper();
    product = go_left ? lower_product : upper_product;
    best = std::max(best, product);
    (go_left ? right : left) = centre();
    if (left > limit) right = left;
  }
};

// The searches of one query block and head after the other, in memory that is kept.
class ChunkScores {
 public:
  ChunkScores(const InfiniteHipParams& params, const CandidateChunks& candidates,
              const HipKernel& kernel, const MeanKernel& mean)
      : params_(params), candidates_(candidates), kernel_(kernel), mean_(mean) {}

  // The scores of a block's candidates.
  void run(const Block& block, int64_t head, float* scores) {
    candidates_.find(block, params_.shared ? 0 : head, chunks_);
    if (chunks_.empty()) return;
    prepare_queries(block, head);
    const int64_t kv_head = head / (params_.num_heads / params_.num_kv_heads);
    keys_ = byte_offset(params_.k,
                        block.batch * params_.k_stride.batch + kv_head * params_.k_stride.head);
    searches_.clear();
    for (const int64_t chunk : chunks_) {
      const int64_t left = params_.sink + chunk * params_.chunk;
      const int64_t right = std::min(left + params_.chunk, params_.seqlen_kv - params_.behind);
      searches_.push_back({left, right, -1, 0.0f, kLeast});
    }
    const int64_t limit = candidates_.limit(block);
    // A single key has been met on the way to it, unless the search begins with it.
    for (int64_t shortest = 0; score([=](const Search& x) { return x.right - x.left > shortest; });
         shortest = 1) {
      const float* product = products_.data();
      for (Search& x : searches_) {
        if (x.right - x.left <= shortest) continue;
        const float lower = x.lower() == x.key ? x.product : *product++;
        const bool met = x.upper() == x.key, same = x.upper() == x.lower();
        const float upper = met ? x.product : same ? lower : *product++;
        x.choose(lower, upper, limit);
      }
    }
    for (size_t i = 0; i < searches_.size(); ++i) scores[i] = searches_[i].best;
  }

 private:
  static constexpr float kLeast = -__builtin_inff();

  const std::byte* byte_offset(const void* base, int64_t elements) const {
    return static_cast<const std::byte*>(base) + elements * element_size(params_.dtype);
  }

  void prepare_queries(const Block& block, int64_t head) {
    const int64_t begin = block.row * params_.block_q;
    const int64_t end = std::min(begin + params_.block_q, params_.seqlen_q);
    const int64_t row_bytes = params_.head_dim * element_size(params_.dtype);
    const int64_t num_queries = ceil_div(end - begin, params_.stride_q);
    means_.reserve(num_queries * row_bytes);
    std::byte* mean = means_.data();
    pointers_.clear();
    for (int64_t row = begin; row < end; row += params_.stride_q, mean += row_bytes) {
      rows_.clear();
      for (int64_t i = row; i < std::min(row + params_.stride_q, end); ++i) {
        rows_.push_back(byte_offset(params_.q, block.batch * params_.q_stride.batch +
                                                   head * params_.q_stride.head +
                                                   i * params_.q_stride.row));
      }
      if (rows_.size() == 1) {
        pointers_.push_back(rows_[0]);
      } else {
        mean_.run(rows_.data(), static_cast<int64_t>(rows_.size()), params_.head_dim, mean);
        pointers_.push_back(mean);
      }
    }
    num_queries_ = num_queries;
    queries_.reserve(kernel_.query_bytes(num_queries, params_.head_dim));
    kernel_.prepare_queries(pointers_.data(), num_queries, params_.head_dim, queries_.data());
  }

  // The products of the keys that the searches want to see next; false if none does.
  bool score(auto goes_on) {
    const int64_t row_bytes = params_.k_stride.row * element_size(params_.dtype);
    pointers_.clear();
    bool any = false;
    for (const Search& x : searches_) {
      if (!goes_on(x)) continue;
      any = true;
      if (x.lower() != x.key) pointers_.push_back(keys_ + x.lower() * row_bytes);
      if (x.upper() != x.key && x.upper() != x.lower()) {
        pointers_.push_back(keys_ + x.upper() * row_bytes);
      }
    }
    const int64_t count = static_cast<int64_t>(pointers_.size());
    if (count == 0) return any;
    pointers_.resize(ceil_div(count, kHipKeys) * kHipKeys, pointers_.back());
    products_.resize(pointers_.size());
    kernel_.score(queries_.data(), num_queries_, params_.head_dim, pointers_.data(), count,
                  products_.data());
    return true;
  }

  const InfiniteHipParams& params_;
  const CandidateChunks& candidates_;
  const HipKernel& kernel_;
  const MeanKernel& mean_;
  const std::byte* keys_ = nullptr;
  int64_t num_queries_ = 0;
  AlignedBuffer means_, queries_;
  std::vector<int32_t> chunks_;
  std::vector<Search> searches_;
  std::vector<const void*> rows_, pointers_;
  std::vector<float> products_;
};

// Writes the list of the candidates of highest score; of equal ones the first.
class Selection {
 public:
  Selection(const InfiniteHipParams& params, const CandidateChunks& candidates)
      : params_(params), candidates_(candidates) {}

  // The scores of the heads that share the list begin `head_stride` apart.
  void run(const Block& block, int64_t group, const float* scores, int64_t head_stride) {
    candidates_.find(block, group, chunks_);
    const int64_t size = static_cast<int64_t>(chunks_.size());
    best_.assign(scores, scores + size);
    for (int64_t head = 1; head < (params_.shared ? params_.num_heads : 1); ++head) {
      const float* other = scores + head * head_stride;
      for (int64_t i = 0; i < size; ++i) best_[i] = std::max(best_[i], other[i]);
    }
    const int64_t count = std::min(params_.width, size);
    if (count < size) keep(count);
    std::sort(chunks_.begin(), chunks_.end());
    const int64_t list = (block.batch * params_.groups() + group) * params_.num_rows() + block.row;
    params_.counts[list] = static_cast<int32_t>(count);
    int32_t* indices = params_.indices + list * params_.width;
    std::fill(std::copy(chunks_.begin(), chunks_.end(), indices), indices + params_.width, 0);
  }

 private:
  void keep(int64_t count) {
    sorted_ = best_;
    const auto last = sorted_.begin() + count - 1;
    std::nth_element(sorted_.begin(), last, sorted_.end(), std::greater<>());
    const float lowest = *last;
    int64_t ties = std::count(sorted_.begin(), last + 1, lowest);
    auto kept = chunks_.begin();
    for (size_t i = 0; i < best_.size(); ++i) {
      if (best_[i] > lowest || (best_[i] == lowest && ties-- > 0)) *kept++ = chunks_[i];
    }
    chunks_.erase(kept, chunks_.end());
  }

  const InfiniteHipParams& params_;
  const CandidateChunks& candidates_;
  std::vector<int32_t> chunks_;
  std::vector<float> best_, sorted_;
};

// Calls work(i, state) for each i, every thread with a state of its own.
void for_each(int64_t n, const Parallel& parallel, const auto& make_state, const auto& work) {
  std::atomic<int64_t> next{0};
  parallel.run(std::min(n, parallel.num_threads), [&](int64_t) {
    auto state = make_state();
    for (int64_t i = next++; i < n; i = next++) work(i, state);
  });
}

}  // namespace

// Some query blocks at a time, so that memory does not grow with the square of the length: first
// the scores of all their heads, then their lists.
void infinite_hip_stage(const InfiniteHipParams& params, Isa isa, const Parallel& parallel) {
  const int64_t rows = params.num_rows(), num_blocks = params.batch * rows;
  if (num_blocks == 0 || params.num_heads == 0) return;
  const int64_t num_queries = ceil_div(std::min(params.block_q, params.seqlen_q), params.stride_q);
  const HipKernel& kernel = find_hip_kernel(isa, params.dtype, num_queries);
  const MeanKernel& mean = find_kernel(isa, &Kernels::mean, params.dtype);
  const CandidateChunks candidates(params);
  const int64_t width = std::max<int64_t>(1, candidates.most());
  constexpr int64_t kScores = int64_t{1} << 22;
  const int64_t at_once = std::clamp<int64_t>(kScores / (width * params.num_heads), 1, num_blocks);
  std::vector<float> scores(at_once * params.num_heads * width);
  for (int64_t first = 0; first < num_blocks; first += at_once) {
    const int64_t n = std::min(at_once, num_blocks - first);
    const auto block = [&](int64_t i) { return Block{(first + i) / rows, (first + i) % rows}; };
    const int64_t head_stride = at_once * width;
    // The blocks of a head follow each other, as they read many of the same keys.
    for_each(
        n * params.num_heads, parallel,
        [&] { return ChunkScores(params, candidates, kernel, mean); },
        [&](int64_t i, ChunkScores& search) {
          const int64_t head = i / n;
          const uint32_t saved = kernel.enter();
          search.run(block(i % n), head, scores.data() + head * head_stride + i % n * width);
          kernel.leave(saved);
        });
    for_each(
        n * params.groups(), parallel, [&] { return Selection(params, candidates); },
        [&](int64_t i, Selection& selection) {
          const int64_t group = i / n;
          selection.run(block(i % n), group, scores.data() + group * head_stride + i % n * width,
                        head_stride);
        });
  }
}

}  // namespace sparse_attn::cpu
