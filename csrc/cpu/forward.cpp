#include "forward.h"

#include <algorithm>
#include <atomic>
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

// The keys of some KV heads as granules. Each calling thread keeps the memory, as fresh pages cost
// more than packing.
class PackedKeys {
 public:
  PackedKeys(const AttentionParams& params, const TileKernel& kernel)
      : params_(params),
        kernel_(kernel),
        k_bytes_(kernel.k_granule_bytes(params.head_dim)),
        v_bytes_(kernel.v_granule_bytes(params.head_dim_v)) {
    // Memory stays below half of what the tensors of the call take: of one very long head, the last
    // keys are not packed.
    const int64_t tensor_bytes =
        element_size(params.dtype) * params.batch * (params.head_dim + params.head_dim_v) *
        (params.num_heads * params.seqlen_q + params.num_kv_heads * params.seqlen_kv);
    const int64_t allowed = std::max(kKeptBytes, tensor_bytes / 20 * 9);
    granules_ =
        std::min((params.seqlen_kv + kGranule - 1) / kGranule, allowed / (k_bytes_ + v_bytes_));
  }
  PackedKeys(const PackedKeys&) = delete;
  PackedKeys& operator=(const PackedKeys&) = delete;
  ~PackedKeys() {
    if (memory().capacity() > kKeptBytes) memory().release();
  }

  int64_t head_bytes() const { return granules_ * (k_bytes_ + v_bytes_); }

  void pack(HeadRange heads, const Parallel& parallel) {
    packed_ = heads;
    const int64_t total = (heads.end - heads.begin) * granules_;
    memory().reserve(total * (k_bytes_ + v_bytes_));
    k_ = memory().data();
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
  static AlignedBuffer& memory() {
    thread_local AlignedBuffer buffer;
    return buffer;
  }

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

  static constexpr int64_t kKeptBytes = int64_t{64} << 20;

  const AttentionParams& params_;
  const TileKernel& kernel_;
  int64_t k_bytes_, v_bytes_;
  int64_t granules_;  // of one head
  HeadRange packed_;
  std::byte* k_ = nullptr;
  std::byte* v_ = nullptr;
};

void run_task(const AttentionParams& params, const TileKernel& kernel, const Task& task,
              const PackedKeys& keys, std::byte* scratch) {
  const auto [b, h, row, rows] = task.tile;
  QueryTile tile;
  tile.q = byte_offset(
      params.q, b * params.q_stride.batch + h * params.q_stride.head + row * params.q_stride.row,
      params.dtype);
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

// Attention of the query heads of some KV heads.
void run_heads(const AttentionParams& params, const TileKernel& kernel, HeadRange kv_heads,
               PackedKeys& keys, const Parallel& threads) {
  std::vector<Task> tasks = make_tasks(params, kv_heads, kernel.block_m);
  sort_tasks(params, kv_heads, tasks);

  int64_t keys_read = 0, pairs = 0;
  for (const Task& task : tasks) {
    keys_read += task.weight;
    pairs += task.weight * task.tile.rows;
  }
  // Other threads wake up in the time that one needs for about a million multiplications.
  constexpr int64_t kWorthThreads = 1 << 20;
  const bool is_small = pairs * (params.head_dim + params.head_dim_v) < kWorthThreads;
  const Parallel& parallel = is_small ? no_threads() : threads;

  // Packing pays when keys are read more than once; otherwise tiles pack what they read.
  const int64_t num_keys = (kv_heads.end - kv_heads.begin) * params.seqlen_kv;
  if (!kernel.in_place && keys_read > num_keys) keys.pack(kv_heads, parallel);

  const int64_t scratch_bytes = KeyCursor::scratch_bytes(params, kernel) +
                                kernel.scratch_bytes(params.head_dim, params.head_dim_v);
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  std::atomic<int64_t> next_task{0};
  parallel.run(std::min(num_tasks, parallel.num_threads), [&](int64_t) {
    thread_local AlignedBuffer scratch;
    scratch.reserve(scratch_bytes);
    const uint32_t saved = kernel.enter();
    for (int64_t i = next_task++; i < num_tasks; i = next_task++) {
      run_task(params, kernel, tasks[i], keys, scratch.data());
    }
    kernel.leave(saved);
  });
}

// Attention of many rows: tiles of queries over packed keys.
void prefill(const AttentionParams& params, Isa isa, const Parallel& parallel) {
  const int64_t num_kv_heads = params.batch * params.num_kv_heads;
  if (num_kv_heads == 0 || params.num_heads == 0 || params.seqlen_q == 0) return;
  const TileKernel& kernel = select_kernel(isa, params);
  PackedKeys keys(params, kernel);

  // As many KV heads at a time as moderate memory holds packed.
  constexpr int64_t kPackedBytesPerThread = int64_t{32} << 20;
  const int64_t fitting =
      parallel.num_threads * kPackedBytesPerThread / std::max<int64_t>(1, keys.head_bytes());
  const int64_t count = kernel.in_place ? num_kv_heads : std::max<int64_t>(1, fitting);
  for (int64_t begin = 0; begin < num_kv_heads; begin += count) {
    run_heads(params, kernel, {begin, std::min(begin + count, num_kv_heads)}, keys, parallel);
  }
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
