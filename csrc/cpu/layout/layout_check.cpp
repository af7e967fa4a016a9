#include "cpu/layout/layout_check.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <string>

#include "cpu/runtime/aligned_buffer.h"
#include "integers.h"
#include "require.h"

namespace sparse_attn::cpu {

namespace {

// What each calling thread keeps of the memory for copies.
constexpr int64_t kKeptLayoutBytes = int64_t{16} << 20;

struct Memory {
  AlignedBuffer numbers;  // sink, window and the counts
  AlignedBuffer indices;
};

Memory& memory() {
  thread_local Memory memory;
  return memory;
}

struct ListNames {
  const char* counts;
  const char* indices;
  const char* values;  // what an index counts
};

constexpr ListNames kBlocks = {"kv_num_blocks", "kv_indices", "key blocks"};
constexpr ListNames kColumns = {"num_columns", "column_indices", "keys"};

int64_t num_lists(const IndexLists& lists) {
  return lists.present() ? lists.batch * lists.heads * lists.rows : 0;
}

std::string position(const IndexLists& lists, int64_t row) {
  return std::to_string(row / (lists.heads * lists.rows)) + ", " +
         std::to_string(row / lists.rows % lists.heads) + ", " + std::to_string(row % lists.rows);
}

// Copies values into memory, and goes on behind them.
void move_values(const int32_t*& values, int64_t n, int32_t*& memory) {
  if (n > 0) std::memcpy(memory, values, n * sizeof(int32_t));
  values = memory;
  memory += n;
}

void check_per_head(const PerHead& values, const char* name, int32_t minimum) {
  for (int64_t h = 0; h < values.heads; ++h) {
    require(values.data[h] >= minimum, name, "[", h, "] = ", values.data[h], " is less than ",
            minimum);
  }
}

// The greatest count, 0 if there is none.
int64_t check_counts(const IndexLists& lists, const ListNames& names) {
  int32_t most = 0;
  for (int64_t row = 0; row < num_lists(lists); ++row) {
    const int32_t count = lists.counts[row];
    if (count < 0 || count > lists.width) {
      require(false, names.counts, "[", position(lists, row), "] = ", count,
              " is not between 0 and the width ", lists.width, " of ", names.indices);
    }
    most = std::max(most, count);
  }
  return most;
}

bool is_valid_list(const int32_t* indices, int64_t count, int64_t limit) {
  int64_t previous = -1;
  bool ascending = true;
  for (int64_t i = 0; i < count; ++i) {
    ascending &= indices[i] > previous;
    previous = indices[i];
  }
  return ascending && previous < limit;
}

[[noreturn]] void report_list(const IndexLists& lists, const ListNames& names, int64_t row,
                              int64_t limit) {
  const int32_t* indices = lists.indices + row * lists.width;
  for (int64_t i = 0; i < lists.counts[row]; ++i) {
    require(indices[i] >= 0 && indices[i] < limit, names.indices, "[", position(lists, row), ", ",
            i, "] = ", indices[i], " is out of range: the layout has ", limit, " ", names.values);
    const int32_t previous = i > 0 ? indices[i - 1] : -1;
    require(indices[i] > previous, names.indices, "[", position(lists, row), ", ", i,
            "] = ", indices[i], " follows ", previous, ": indices must be strictly ascending");
  }
  __builtin_unreachable();
}

// Copies the listed indices, whose counts are copied and checked, to lists of the given width.
void move_indices(IndexLists& lists, const ListNames& names, int64_t width, int64_t limit,
                  int32_t*& memory, const Parallel& parallel) {
  if (!lists.present()) return;
  const IndexLists given = lists;
  int32_t* const copies = memory;
  lists.indices = copies;
  lists.width = width;
  const int64_t num_rows = num_lists(lists);
  memory += num_rows * width;
  constexpr int64_t kEntriesPerTask = 1 << 15;
  const int64_t rows_per_task = std::max<int64_t>(1, kEntriesPerTask / (width + 8));
  const int64_t num_tasks = ceil_div(num_rows, rows_per_task);
  std::atomic<int64_t> first_bad{std::numeric_limits<int64_t>::max()};
  const auto run = [&](int64_t task) {
    const int64_t end = std::min(num_rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) {
      const int64_t count = lists.counts[row];
      if (count == 0) continue;
      int32_t* const copy = copies + row * width;
      std::memcpy(copy, given.indices + row * given.width, count * sizeof(int32_t));
      if (is_valid_list(copy, count, limit)) continue;
      int64_t seen = first_bad.load();
      while (row < seen && !first_bad.compare_exchange_weak(seen, row)) {
      }
      return;
    }
  };
  if (num_tasks > 1) {
    parallel.run(num_tasks, run);
  } else if (num_tasks == 1) {
    run(0);
  }
  if (first_bad < num_rows) report_list(lists, names, first_bad, limit);
}

}  // namespace

CheckedLayout::CheckedLayout(AttentionParams& params, const Parallel& parallel) {
  PerHead &sink = params.sink, &window = params.window;
  IndexLists &blocks = params.blocks, &columns = params.columns;
  auto& [numbers, indices] = memory();
  constexpr int64_t kSize = sizeof(int32_t);
  numbers.reserve(kSize * (sink.heads + window.heads + num_lists(blocks) + num_lists(columns)));
  int32_t* next = reinterpret_cast<int32_t*>(numbers.data());
  move_values(sink.data, sink.heads, next);
  move_values(window.data, window.heads, next);
  check_per_head(sink, "sink", 0);
  check_per_head(window, "window", -1);
  if (blocks.present()) move_values(blocks.counts, num_lists(blocks), next);
  if (columns.present()) move_values(columns.counts, num_lists(columns), next);
  const int64_t most_blocks = check_counts(blocks, kBlocks);
  const int64_t most_columns = check_counts(columns, kColumns);
  indices.reserve(kSize * (num_lists(blocks) * most_blocks + num_lists(columns) * most_columns));
  next = reinterpret_cast<int32_t*>(indices.data());
  const int64_t num_blocks = ceil_div(params.seqlen_kv, params.block_kv);
  move_indices(blocks, kBlocks, most_blocks, num_blocks, next, parallel);
  move_indices(columns, kColumns, most_columns, params.seqlen_kv, next, parallel);
}

CheckedLayout::~CheckedLayout() {
  for (AlignedBuffer* buffer : {&memory().numbers, &memory().indices}) {
    if (buffer->capacity() > kKeptLayoutBytes) buffer->release();
  }
}

}  // namespace sparse_attn::cpu
