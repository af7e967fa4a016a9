#include "cpu/forward/prefill.h"

#include <algorithm>
#include <bit>
#include <deque>
#include <vector>

#include "cpu/forward/decode.h"
#include "cpu/forward/packed_keys.h"
#include "cpu/isa/kernels.h"
#include "cpu/kernels/key_cursor.h"
#include "cpu/runtime/head_queue.h"

namespace sparse_attn::cpu {

namespace {

const TileKernel& select_kernel(Isa isa, const ForwardParams& params) {
  if (params.dtype == DType::kFloat32 && params.split_float32 && !params.for_gradients) {
    const TileKernel* kernel = find_kernel(isa, &Kernels::tile_splitting_float32);
    if (kernel != nullptr) return *kernel;
  }
  return find_kernel(isa, &Kernels::tile, params.dtype);
}

// Memory for packed keys stays below half of what the tensors of the calls take.
int64_t allowed_bytes(std::span<const ForwardParams> calls) {
  int64_t tensor_bytes = 0;
  for (const ForwardParams& params : calls) {
    tensor_bytes += element_size(params.dtype) * params.batch *
                    (params.head_dim + params.head_dim_v) *
                    (params.num_heads * params.seqlen_q + params.num_kv_heads * params.seqlen_kv);
  }
  return std::max(kKeptBytes, tensor_bytes / 20 * 9);
}

// One query tile and an estimate of how many keys it reads.
struct Task {
  TileIndex tile;
  int64_t weight = 0;
};

// The query tiles of all heads that share one KV head, for any number of threads: they pack the
// keys together where these are read more than once (otherwise tiles pack what they read), and
// then take tiles, until nothing is left to take.
class HeadWork {
 public:
  HeadWork(const ForwardParams& params, const TileKernel& kernel, Isa isa, int64_t kv_head,
           int64_t most_packed_bytes)
      : params_(params),
        kernel_(kernel),
        isa_(isa),
        kv_head_(kv_head),
        keys_(params, kernel, kv_head, most_packed_bytes) {}

  // Lists the tiles, none of which spans two rows of an index list.
  void list() {
    if (is_listed_) return;
    is_listed_ = true;
    const int64_t group_size = params_.num_heads / params_.num_kv_heads;
    int64_t keys_read = 0;
    for (int64_t i = kv_head_ * group_size; i < (kv_head_ + 1) * group_size; ++i) {
      for_each_run(params_, 0, params_.seqlen_q, [&](int64_t row, int64_t rows) {
        const int64_t end = row + rows;
        for (; row < end; row += kernel_.block_m) {
          const TileIndex tile = {i / params_.num_heads, i % params_.num_heads, row,
                                  std::min(kernel_.block_m, end - row)};
          tasks_.push_back({tile, candidate_estimate(params_, tile)});
          keys_read += tasks_.back().weight;
          pairs_ += tasks_.back().weight * tile.rows;
        }
      });
    }
    // What is left for the end is light.
    std::stable_sort(tasks_.begin(), tasks_.end(),
                     [](const Task& a, const Task& b) { return a.weight > b.weight; });
    if (!kernel_.in_place && keys_read > params_.seqlen_kv) num_chunks_ = keys_.num_chunks();
  }

  int64_t num_multiplications() const { return pairs_ * (params_.head_dim + params_.head_dim_v); }
  int64_t packed_bytes() const { return kernel_.in_place ? 0 : keys_.bytes(); }
  int64_t scratch_bytes() const { return cursor_bytes() + tile_bytes(); }

  void open(std::byte* memory) {
    memory_ = memory;
    phases_.open(num_chunks_, num_tasks());
  }

  bool help(std::byte* scratch) {
    const auto pack = [&](int64_t i) { keys_.pack_chunk(i, memory_); };
    const auto run = [&](int64_t i) {
      run_tile(tasks_[i], i + 1 < num_tasks() ? &tasks_[i + 1] : nullptr, scratch);
    };
    return phases_.help(pack, run);
  }

  bool is_taken() const { return phases_.is_taken(); }
  bool is_done() const { return phases_.is_done(); }

 private:
  int64_t num_tasks() const { return static_cast<int64_t>(tasks_.size()); }
  int64_t cursor_bytes() const { return KeyCursor::scratch_bytes(params_, kernel_); }
  int64_t tile_bytes() const { return kernel_.scratch_bytes(params_.head_dim, params_.head_dim_v); }

  const std::byte* first_q(const TileIndex& tile) const {
    const Strides& stride = params_.q_stride;
    return static_cast<const std::byte*>(params_.q) +
           (tile.batch * stride.batch + tile.head * stride.head + tile.row * stride.row) *
               element_size(params_.dtype);
  }

  // Whether all rows of the result, one of which is at `out`, are whole cache lines.
  bool rows_are_lines(const void* out) const {
    constexpr int64_t kLine = 64, kVector = 32;
    const int64_t row_bytes = params_.out_stride.row * element_size(params_.dtype);
    return reinterpret_cast<uintptr_t>(out) % kLine == 0 && row_bytes % kLine == 0 &&
           params_.head_dim_v % kVector == 0;
  }

  // `next` is the task that likely follows, or null.
  void run_tile(const Task& task, const Task* next, std::byte* scratch) const {
    const auto [b, h, row, rows] = task.tile;
    const Strides& out_stride = params_.out_stride;
    QueryTile tile;
    tile.q = first_q(task.tile);
    if (next != nullptr) tile.next_q = first_q(next->tile);
    tile.out = static_cast<std::byte*>(params_.out) +
               (b * out_stride.batch + h * out_stride.head + row * out_stride.row) *
                   element_size(params_.dtype);
    tile.lse = params_.lse + (b * params_.num_heads + h) * params_.lse_stride + row;
    tile.q_row_stride = params_.q_stride.row;
    tile.out_row_stride = out_stride.row;
    tile.streams_out = params_.streams_out && rows_are_lines(tile.out);
    tile.rows = rows;
    tile.head_dim = params_.head_dim;
    tile.head_dim_v = params_.head_dim_v;
    tile.score_as(params_);
    tile.sink_logit = params_.sink_logits != nullptr ? params_.sink_logits + h : nullptr;
    KeyCursor cursor(params_, kernel_, task.tile, keys_.source(num_chunks_ > 0 ? memory_ : nullptr),
                     scratch);
    uint64_t repeated = kernel_.run_tile(tile, cursor, scratch + cursor_bytes());
    for (; repeated != 0; repeated &= repeated - 1) {
      decode_row(params_, {b, h, row + std::countr_zero(repeated), 1}, isa_);
    }
  }

  const ForwardParams& params_;
  const TileKernel& kernel_;
  Isa isa_;
  int64_t kv_head_;  // counted over the whole batch
  PackedKeys keys_;
  std::vector<Task> tasks_;
  int64_t pairs_ = 0;
  int64_t num_chunks_ = 0;  // of keys that are packed
  bool is_listed_ = false;
  std::byte* memory_ = nullptr;
  TwoPhases phases_;  // chunks of keys, tiles
};

}  // namespace

void prefill(std::span<const ForwardParams> calls, Isa isa, const Parallel& threads) {
  if (calls.empty()) return;
  const TileKernel& kernel = select_kernel(isa, calls.front());
  const int64_t allowed = allowed_bytes(calls);
  std::deque<HeadWork> heads;
  for (const ForwardParams& params : calls) {
    if (params.num_heads == 0 || params.seqlen_q == 0) continue;
    for (int64_t i = 0; i < params.batch * params.num_kv_heads; ++i) {
      heads.emplace_back(params, kernel, isa, i, allowed);
    }
  }
  HeadQueue<HeadWork>(heads, allowed, kernel.enter, kernel.leave).run(threads);
}

}  // namespace sparse_attn::cpu
