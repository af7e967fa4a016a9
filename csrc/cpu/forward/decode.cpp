#include "cpu/forward/decode.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <vector>

#include "cpu/isa/kernels.h"
#include "cpu/runtime/aligned_buffer.h"
#include "integers.h"

namespace sparse_attn::cpu {

namespace {

constexpr int64_t kSplitKeys = 2048;

// A tile, and where its states lie among those of all tiles.
struct Group {
  const ForwardParams* params = nullptr;
  TileIndex index;
  int64_t kv_head = 0, heads = 0;
  int64_t candidates = 0, num_splits = 1;
  int64_t first_task = 0, first_float = 0;

  int64_t rows() const { return heads * index.rows; }
  int64_t floats_per_state() const { return state_floats(rows(), params->head_dim_v); }
};

Group make_group(const ForwardParams& params, const TileIndex& index, int64_t heads) {
  Group group;
  group.params = &params;
  group.index = index;
  group.kv_head = index.head / (params.num_heads / params.num_kv_heads);
  group.heads = heads;
  const CandidateWalk walk(params, index);
  group.candidates = walk.count_below(walk.limit());
  group.num_splits = std::max<int64_t>(1, ceil_div(group.candidates, kSplitKeys));
  return group;
}

// Appends the groups of one KV head and of queries that share their lists.
void add_groups(const ForwardParams& params, int64_t b, int64_t kv_head, int64_t row, int64_t rows,
                std::vector<Group>& groups) {
  const int64_t group_size = params.num_heads / params.num_kv_heads;
  const int64_t end = (kv_head + 1) * group_size;
  const int64_t most = std::max<int64_t>(1, kMostDecodeRows / rows);
  for (int64_t head = kv_head * group_size, next = head; head < end; head = next) {
    for (next = head + 1; next < end && next - head < most; ++next) {
      if (!have_same_rules(params, head, next)) break;
    }
    groups.push_back(make_group(params, {b, head, row, rows}, next - head));
  }
}

void add_groups(const ForwardParams& params, std::vector<Group>& groups) {
  for (int64_t b = 0; b < params.batch; ++b) {
    for (int64_t kv_head = 0; kv_head < params.num_kv_heads; ++kv_head) {
      for_each_run(params, 0, params.seqlen_q, [&](int64_t row, int64_t rows) {
        const int64_t end = row + rows;
        for (; row < end; row += kMostDecodeQueries) {
          add_groups(params, b, kv_head, row, std::min(kMostDecodeQueries, end - row), groups);
        }
      });
    }
  }
}

// The position, a multiple of 32, before which about i of n equal parts of the candidates lie.
int64_t split_point(const CandidateWalk& walk, int64_t candidates, int64_t i, int64_t n) {
  if (i == 0) return 0;
  if (i == n) return walk.limit();
  const int64_t wanted = candidates / n * i;
  int64_t low = 0, high = walk.limit() / kGranule;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (walk.count_below(middle * kGranule) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low * kGranule;
}

DecodeTile describe_tile(const Group& group) {
  const ForwardParams& params = *group.params;
  const auto [b, head, row, rows] = group.index;
  const auto offset = [&](const Strides& stride) {
    return b * stride.batch + head * stride.head + row * stride.row;
  };
  DecodeTile tile;
  tile.q = byte_offset(params.q, offset(params.q_stride), params.dtype);
  tile.out =
      static_cast<std::byte*>(params.out) + offset(params.out_stride) * element_size(params.dtype);
  tile.lse = params.lse + (b * params.num_heads + head) * params.lse_stride + row;
  tile.q_head_stride = params.q_stride.head;
  tile.q_row_stride = params.q_stride.row;
  tile.out_head_stride = params.out_stride.head;
  tile.out_row_stride = params.out_stride.row;
  tile.lse_head_stride = params.lse_stride;
  tile.heads = group.heads;
  tile.queries = rows;
  tile.head_dim = params.head_dim;
  tile.head_dim_v = params.head_dim_v;
  tile.score_as(params);
  tile.sink_logits = params.sink_logits != nullptr ? params.sink_logits + head : nullptr;
  return tile;
}

// Writes the results of a group whose states are there. Rows for which keys that they do not see
// may have mattered are repeated.
void finish_group(const Group& group, const float* states, Isa isa) {
  const ForwardParams& params = *group.params;
  uint64_t repeated = find_kernel(isa, &Kernels::decode, params.dtype)
                          .finish(describe_tile(group), states, group.num_splits);
  const auto [b, head, row, queries] = group.index;
  if (queries == 1) return;
  for (; repeated != 0; repeated &= repeated - 1) {
    const int r = std::countr_zero(repeated);
    decode_row(params, {b, head + r / queries, row + r % queries, 1}, isa);
  }
}

void run_split(const Group& group, int64_t split, const DecodeKernel& kernel, float* state,
               std::byte* scratch) {
  CandidateWalk walk(*group.params, group.index);
  if (group.num_splits > 1) {
    walk.restrict_to({split_point(walk, group.candidates, split, group.num_splits),
                      split_point(walk, group.candidates, split + 1, group.num_splits)});
  }
  DecodeKeys keys(*group.params, walk, group.index, group.kv_head);
  kernel.run(describe_tile(group), keys, state, scratch);
}

}  // namespace

bool is_decode(const AttentionParams& params, Isa isa) {
  int64_t most = kMostDecodeQueries;
  // Tiles multiply 16 rows in the time that vectors take for a few.
  if (isa == Isa::kAmx && params.dtype == DType::kBFloat16) most = 8;
  // Two vectors of rows in a tile are faster than more rows one by one, but do not share their keys
  // among threads; long rows of float32 are read by tiles no faster.
  const bool many_heads = params.batch * params.num_heads >= 8;
  const bool short_rows = params.dtype != DType::kFloat32 || params.head_dim < 128;
  if (isa == Isa::kAvx2 && many_heads && short_rows) most = 12;
  return params.seqlen_q <= most;
}

void decode_row(const ForwardParams& params, const TileIndex& row, Isa isa) {
  thread_local AlignedBuffer memory;
  const DecodeKernel& kernel = find_kernel(isa, &Kernels::decode, params.dtype);
  const Group group = make_group(params, row, 1);
  const int64_t state_bytes =
      group.num_splits * group.floats_per_state() * static_cast<int64_t>(sizeof(float));
  memory.reserve(state_bytes + kernel.scratch_bytes(1, params.head_dim));
  float* states = reinterpret_cast<float*>(memory.data());
  for (int64_t split = 0; split < group.num_splits; ++split) {
    run_split(group, split, kernel, states + split * group.floats_per_state(),
              memory.data() + state_bytes);
  }
  finish_group(group, states, isa);
}

void decode(std::span<const ForwardParams> calls, Isa isa, const Parallel& parallel) {
  thread_local std::vector<Group> groups;
  thread_local AlignedBuffer memory;
  groups.clear();
  int64_t num_tasks = 0, num_floats = 0, bytes_read = 0, most_scratch = 0;
  if (calls.empty()) return;
  const DecodeKernel& kernel = find_kernel(isa, &Kernels::decode, calls.front().dtype);
  for (const ForwardParams& params : calls) add_groups(params, groups);
  if (groups.empty()) return;
  for (Group& group : groups) {
    group.first_task = num_tasks;
    group.first_float = num_floats;
    num_tasks += group.num_splits;
    num_floats += group.num_splits * group.floats_per_state();
    const ForwardParams& params = *group.params;
    bytes_read += group.candidates * (params.head_dim + params.head_dim_v) *
                  element_size(params.dtype) * std::max<int64_t>(1, group.rows() / 4);
    most_scratch = std::max(most_scratch, kernel.scratch_bytes(group.rows(), params.head_dim));
  }
  // At the ends of float32 denormal numbers may be all there is.
  const bool flushes = calls.front().has_ordinary_scale();
  memory.reserve(num_floats * static_cast<int64_t>(sizeof(float)));
  float* states = reinterpret_cast<float*>(memory.data());

  // Other threads are not worth waking for some 20 microseconds of work.
  constexpr int64_t kSerialBytes = int64_t{1} << 18;
  const auto run_parallel = [&](int64_t n, const std::function<void(int64_t)>& f) {
    if (bytes_read > kSerialBytes && n > 1) {
      parallel.run(n, f);
    } else {
      for (int64_t i = 0; i < n; ++i) f(i);
    }
  };
  const std::span<const Group> all = groups;
  const int64_t num_workers = std::min(num_tasks, parallel.num_threads);
  std::atomic<int64_t> next_task{0};
  run_parallel(num_workers, [&](int64_t) {
    thread_local AlignedBuffer scratch;
    scratch.reserve(most_scratch);
    const uint32_t saved = flushes ? kernel.enter() : 0;
    size_t g = 0;
    for (int64_t i = next_task++; i < num_tasks; i = next_task++) {
      while (i >= all[g].first_task + all[g].num_splits) ++g;
      const int64_t split = i - all[g].first_task;
      float* state = states + all[g].first_float + split * all[g].floats_per_state();
      run_split(all[g], split, kernel, state, scratch.data());
      if (all[g].num_splits == 1) finish_group(all[g], state, isa);
    }
    if (flushes) kernel.leave(saved);
  });
  if (num_tasks == static_cast<int64_t>(all.size())) return;
  std::atomic<size_t> next_group{0};
  run_parallel(std::min<int64_t>(all.size(), parallel.num_threads), [&](int64_t) {
    const uint32_t saved = flushes ? kernel.enter() : 0;
    for (size_t g = next_group++; g < all.size(); g = next_group++) {
      if (all[g].num_splits == 1) continue;
      finish_group(all[g], states + all[g].first_float, isa);
    }
    if (flushes) kernel.leave(saved);
  });
}

}  // namespace sparse_attn::cpu
