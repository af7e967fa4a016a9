#include "forward.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <thread>
#include <vector>

#include "aligned_buffer.h"
#include "decode.h"
#include "kernel.h"
#include "key_cursor.h"
#include "layout_check.h"

namespace sparse_attn::cpu {

namespace {

const TileKernel& select_kernel(Isa isa, const AttentionParams& params) {
  const DType dtype = params.dtype;
#if defined(__x86_64__)
  const bool for_amx = dtype != DType::kFloat32 || (params.split_float32 && !params.for_gradients);
  if (isa == Isa::kAmx && for_amx) return amx_kernel(dtype);
  if (isa >= Isa::kAvx512) return avx512_kernel(dtype);
  if (isa == Isa::kAvx2) return avx2_kernel(dtype);
#endif
  return generic_kernel(dtype);
}

const std::byte* byte_offset(const void* base, int64_t elements, DType dtype) {
  return static_cast<const std::byte*>(base) + elements * element_size(dtype);
}

// What each calling thread keeps of the memory for packed keys, as fresh pages cost more than
// packing.
constexpr int64_t kKeptBytes = int64_t{64} << 20;

// One query tile and an estimate of its work.
struct Task {
  TileIndex tile;
  int64_t weight = 0;
};

// KV heads [begin, end), counted over the whole batch, whose keys are packed at the same time.
struct HeadRange {
  int64_t begin = 0, end = 0;
};

// Cuts the rows of all query heads of some KV heads into tiles, none of which spans two rows of an
// index list.
std::vector<Task> make_tasks(const AttentionParams& params, HeadRange kv_heads, int64_t block_m) {
  int64_t unit = params.seqlen_q;
  if (params.columns.present()) unit = std::min(unit, params.block_q * params.column_group);
  if (params.blocks.present()) unit = std::min(unit, params.block_q);
  std::vector<Task> tasks;
  const int64_t group_size = params.num_heads / params.num_kv_heads;
  for (int64_t i = kv_heads.begin * group_size; i < kv_heads.end * group_size; ++i) {
    for (int64_t begin = 0; begin < params.seqlen_q; begin += unit) {
      const int64_t end = std::min(begin + unit, params.seqlen_q);
      for (int64_t row = begin; row < end; row += block_m) {
        Task task;
        task.tile = {i / params.num_heads, i % params.num_heads, row, std::min(block_m, end - row)};
        task.weight = candidate_estimate(params, task.tile);
        tasks.push_back(task);
      }
    }
  }
  return tasks;
}

int64_t kv_head_of(const AttentionParams& params, const TileIndex& tile) {
  const int64_t group_size = params.num_heads / params.num_kv_heads;
  return tile.batch * params.num_kv_heads + tile.head / group_size;
}

// Heavy KV heads first, and heavy tiles first within one: tiles that share keys stay together,
// and what is left for the end is light.
void sort_tasks(const AttentionParams& params, HeadRange kv_heads, std::vector<Task>& tasks) {
  std::vector<int64_t> head_weight(kv_heads.end - kv_heads.begin);
  const auto head = [&](const Task& task) {
    return kv_head_of(params, task.tile) - kv_heads.begin;
  };
  for (const Task& task : tasks) head_weight[head(task)] += task.weight;
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
    const int64_t head_a = head(a), head_b = head(b);
    if (head_a == head_b) return a.weight > b.weight;
    const int64_t weight_a = head_weight[head_a], weight_b = head_weight[head_b];
    return weight_a != weight_b ? weight_a > weight_b : head_a < head_b;
  });
}

// The keys of some KV heads as granules, in memory of the caller.
class PackedKeys {
 public:
  PackedKeys(const AttentionParams& params, const TileKernel& kernel)
      : params_(params),
        kernel_(kernel),
        k_bytes_(kernel.k_granule_bytes(params.head_dim)),
        v_bytes_(kernel.v_granule_bytes(params.head_dim_v)) {
    // Memory stays below half of what the tensors of the call take: of one very long head, the last
    // keys are not packed.
    granules_ = std::min((params.seqlen_kv + kGranule - 1) / kGranule,
                         allowed_bytes(params) / (k_bytes_ + v_bytes_));
  }

  static int64_t allowed_bytes(const AttentionParams& params) {
    const int64_t tensor_bytes =
        element_size(params.dtype) * params.batch * (params.head_dim + params.head_dim_v) *
        (params.num_heads * params.seqlen_q + params.num_kv_heads * params.seqlen_kv);
    return std::max(kKeptBytes, tensor_bytes / 20 * 9);
  }

  int64_t head_bytes() const { return granules_ * (k_bytes_ + v_bytes_); }

  void pack(HeadRange heads, std::byte* memory, const Parallel& parallel) {
    packed_ = heads;
    const int64_t total = (heads.end - heads.begin) * granules_;
    k_ = memory;
    v_ = k_ + total * k_bytes_;
    constexpr int64_t kPerTask = 16;
    parallel.run((total + kPerTask - 1) / kPerTask, [&](int64_t task) {
      const uint32_t saved = kernel_.enter();
      const int64_t end = std::min(total, (task + 1) * kPerTask);
      for (int64_t i = task * kPerTask; i < end; ++i) pack_granule(i);
      kernel_.leave(saved);
    });
  }

  KeySource source(int64_t kv_head) const {
    KeySource source;
    const int64_t b = kv_head / params_.num_kv_heads, h = kv_head % params_.num_kv_heads;
    source.k = byte_offset(params_.k, b * params_.k_stride.batch + h * params_.k_stride.head,
                           params_.dtype);
    source.v = byte_offset(params_.v, b * params_.v_stride.batch + h * params_.v_stride.head,
                           params_.dtype);
    if (kv_head >= packed_.begin && kv_head < packed_.end) {
      const int64_t first = (kv_head - packed_.begin) * granules_;
      source.packed_granules = granules_;
      source.packed_k = k_ + first * k_bytes_;
      source.packed_v = v_ + first * v_bytes_;
    }
    return source;
  }

 private:
  void pack_granule(int64_t slot) {
    alignas(64) static const std::byte kZeroRow[kMaxHeadDim * sizeof(float)] = {};
    const KeySource head = source(packed_.begin + slot / granules_);
    const int64_t first = slot % granules_ * kGranule;
    const int64_t size = element_size(params_.dtype);
    const void* k_rows[kGranule];
    const void* v_rows[kGranule];
    for (int64_t i = 0; i < kGranule; ++i) {
      const int64_t j = first + i;
      const bool exists = j < params_.seqlen_kv;
      k_rows[i] = exists ? head.k + params_.key_offset(params_.k_stride, j) * size : kZeroRow;
      v_rows[i] = exists ? head.v + params_.key_offset(params_.v_stride, j) * size : kZeroRow;
    }
    kernel_.pack_k(k_rows, params_.head_dim, k_ + slot * k_bytes_);
    kernel_.pack_v(v_rows, params_.head_dim_v, v_ + slot * v_bytes_);
  }

  const AttentionParams& params_;
  const TileKernel& kernel_;
  int64_t k_bytes_, v_bytes_;
  int64_t granules_;  // of one head
  HeadRange packed_;
  std::byte* k_ = nullptr;
  std::byte* v_ = nullptr;
};

const std::byte* first_q(const AttentionParams& params, const TileIndex& tile) {
  const int64_t offset = tile.batch * params.q_stride.batch + tile.head * params.q_stride.head +
                         tile.row * params.q_stride.row;
  return byte_offset(params.q, offset, params.dtype);
}

// `next` is the task that likely follows, or null.
void run_task(const AttentionParams& params, const TileKernel& kernel, const Task& task,
              const Task* next, const PackedKeys& keys, std::byte* scratch) {
  const auto [b, h, row, rows] = task.tile;
  QueryTile tile;
  tile.q = first_q(params, task.tile);
  if (next != nullptr) tile.next_q = first_q(params, next->tile);
  tile.out = const_cast<std::byte*>(byte_offset(
      params.out,
      b * params.out_stride.batch + h * params.out_stride.head + row * params.out_stride.row,
      params.dtype));
  tile.lse = params.lse + (b * params.num_heads + h) * params.lse_stride + row;
  tile.q_row_stride = params.q_stride.row;
  tile.out_row_stride = params.out_stride.row;
  tile.rows = rows;
  tile.head_dim = params.head_dim;
  tile.head_dim_v = params.head_dim_v;
  tile.scale = params.scale;
  tile.softcap = params.softcap;
  tile.sink_logit = params.sinks != nullptr ? params.sinks + h : nullptr;
  KeyCursor cursor(params, kernel, task.tile, keys.source(kv_head_of(params, task.tile)), scratch);
  kernel.run_tile(tile, cursor, scratch + KeyCursor::scratch_bytes(params, kernel));
}

// Everything on the calling thread.
const Parallel& no_threads() {
  static const Parallel kNone = {1, [](int64_t n, const std::function<void(int64_t)>& f) {
                                   for (int64_t i = 0; i < n; ++i) f(i);
                                 }};
  return kNone;
}

// The query tiles of some KV heads, for any number of threads to take from.
class Work {
 public:
  Work(const AttentionParams& params, const TileKernel& kernel, HeadRange kv_heads)
      : params_(params), kernel_(kernel), kv_heads_(kv_heads), keys_(params, kernel) {}

  // Lists the tiles, and packs the keys into `memory` where they are read more than once;
  // otherwise tiles pack what they read. To be called before anything else.
  void prepare(std::byte* memory, const Parallel& threads) {
    tasks_ = make_tasks(params_, kv_heads_, kernel_.block_m);
    sort_tasks(params_, kv_heads_, tasks_);
    int64_t keys_read = 0;
    for (const Task& task : tasks_) {
      keys_read += task.weight;
      pairs_ += task.weight * task.tile.rows;
    }
    const int64_t num_keys = (kv_heads_.end - kv_heads_.begin) * params_.seqlen_kv;
    if (!kernel_.in_place && keys_read > num_keys) {
      keys_.pack(kv_heads_, memory, is_small() ? no_threads() : threads);
    }
  }

  // Other threads wake up in the time that one needs for about a million multiplications.
  bool is_small() const {
    constexpr int64_t kWorthThreads = 1 << 20;
    return pairs_ * (params_.head_dim + params_.head_dim_v) < kWorthThreads;
  }

  // Runs tiles until none is left.
  void run() {
    if (next_ >= num_tasks()) return;
    thread_local AlignedBuffer scratch;
    scratch.reserve(KeyCursor::scratch_bytes(params_, kernel_) +
                    kernel_.scratch_bytes(params_.head_dim, params_.head_dim_v));
    const uint32_t saved = kernel_.enter();
    for (int64_t i = next_++; i < num_tasks(); i = next_++) {
      const int64_t following = next_;
      const Task* next = following < num_tasks() ? &tasks_[following] : nullptr;
      run_task(params_, kernel_, tasks_[i], next, keys_, scratch.data());
    }
    kernel_.leave(saved);
  }

  int64_t num_tasks() const { return static_cast<int64_t>(tasks_.size()); }

 private:
  const AttentionParams& params_;
  const TileKernel& kernel_;
  HeadRange kv_heads_;
  PackedKeys keys_;
  std::vector<Task> tasks_;
  int64_t pairs_ = 0;
  std::atomic<int64_t> next_{0};
};

// All threads work on some KV heads together, then on the next ones.
void run_together(const AttentionParams& params, const TileKernel& kernel, AlignedBuffer& memory,
                  const Parallel& threads) {
  // As many KV heads at a time as moderate memory holds packed.
  constexpr int64_t kPackedBytesPerThread = int64_t{32} << 20;
  const int64_t num_heads = params.batch * params.num_kv_heads;
  const int64_t head_bytes = PackedKeys(params, kernel).head_bytes();
  const int64_t fitting =
      threads.num_threads * kPackedBytesPerThread / std::max<int64_t>(1, head_bytes);
  const int64_t count = kernel.in_place ? num_heads : std::max<int64_t>(1, fitting);
  if (!kernel.in_place) memory.reserve(std::min(count, num_heads) * head_bytes);
  for (int64_t begin = 0; begin < num_heads; begin += count) {
    Work work(params, kernel, {begin, std::min(begin + count, num_heads)});
    work.prepare(memory.data(), threads);
    const Parallel& parallel = work.is_small() ? no_threads() : threads;
    parallel.run(std::min(work.num_tasks(), parallel.num_threads), [&](int64_t) { work.run(); });
  }
}

// Each thread takes one KV head after the other, so that packed keys stay in its own cache, and
// helps others when no head is left to take.
void run_apart(const AttentionParams& params, const TileKernel& kernel, AlignedBuffer& memory,
               const Parallel& threads) {
  struct Head {
    Head(const AttentionParams& params, const TileKernel& kernel, int64_t i)
        : work(params, kernel, {i, i + 1}) {}
    Work work;
    std::atomic<bool> is_prepared{false};
  };
  std::deque<Head> heads;
  for (int64_t i = 0; i < params.batch * params.num_kv_heads; ++i) {
    heads.emplace_back(params, kernel, i);
  }
  const int64_t num_heads = static_cast<int64_t>(heads.size());
  const int64_t head_bytes = PackedKeys(params, kernel).head_bytes();
  memory.reserve(threads.num_threads * head_bytes);
  std::atomic<int64_t> next_head{0};
  threads.run(threads.num_threads, [&](int64_t thread) {
    for (int64_t i = next_head++; i < num_heads; i = next_head++) {
      try {
        heads[i].work.prepare(memory.data() + thread * head_bytes, no_threads());
      } catch (...) {
        heads[i].is_prepared = true;  // nobody waits for it
        throw;
      }
      heads[i].is_prepared = true;
      heads[i].work.run();
    }
    for (Head& head : heads) {
      while (!head.is_prepared) std::this_thread::yield();
      head.work.run();
    }
  });
}

// Attention of many rows: tiles of queries over packed keys.
void prefill(const AttentionParams& params, Isa isa, const Parallel& threads) {
  const int64_t num_heads = params.batch * params.num_kv_heads;
  if (num_heads == 0 || params.num_heads == 0 || params.seqlen_q == 0) return;
  const TileKernel& kernel = select_kernel(isa, params);
  thread_local AlignedBuffer memory;
  // What the caches hold of packed keys anyway needs no care.
  constexpr int64_t kCached = int64_t{4} << 20;
  const int64_t head_bytes = PackedKeys(params, kernel).head_bytes();
  if (!kernel.in_place && num_heads >= threads.num_threads && num_heads * head_bytes > kCached &&
      threads.num_threads * head_bytes <= PackedKeys::allowed_bytes(params)) {
    run_apart(params, kernel, memory, threads);
  } else {
    run_together(params, kernel, memory, threads);
  }
  if (memory.capacity() > kKeptBytes) memory.release();
}

}  // namespace

void forward(const AttentionParams& params, Isa isa, const Parallel& parallel) {
  check_layout(params, parallel);
  if (is_decode(params, isa) && !params.for_gradients) return decode({&params, 1}, isa, parallel);
  prefill(params, isa, parallel);
}

void forward_varlen(const AttentionParams& greatest, std::span<const AttentionParams> sequences,
                    Isa isa, const Parallel& parallel) {
  check_layout(greatest, parallel);
  std::vector<AttentionParams> short_ones;
  for (const AttentionParams& params : sequences) {
    if (is_decode(params, isa)) {
      short_ones.push_back(params);
    } else {
      prefill(params, isa, parallel);
    }
  }
  decode(short_ones, isa, parallel);
}

}  // namespace sparse_attn::cpu
