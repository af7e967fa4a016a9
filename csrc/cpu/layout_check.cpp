#include "layout_check.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>

namespace sparse_attn::cpu {

namespace {

struct ListNames {
  const char* counts;
  const char* indices;
  const char* values;  // what an index counts
};

std::string position(const IndexLists& lists, int64_t row) {
  return std::to_string(row / (lists.heads * lists.rows)) + ", " +
         std::to_string(row / lists.rows % lists.heads) + ", " + std::to_string(row % lists.rows);
}

bool is_valid_row(const IndexLists& lists, int64_t row, int64_t limit) {
  const int64_t count = lists.counts[row];
  if (count < 0 || count > lists.width) return false;
  const int32_t* indices = lists.indices + row * lists.width;
  int64_t previous = -1;
  bool ascending = true;
  for (int64_t i = 0; i < count; ++i) {
    ascending &= indices[i] > previous;
    previous = indices[i];
  }
  return ascending && previous < limit;
}

[[noreturn]] void report_row(const IndexLists& lists, const ListNames& names, int64_t row,
                             int64_t limit) {
  const int64_t count = lists.counts[row];
  const std::string where = position(lists, row);
  if (count < 0 || count > lists.width) {
    throw std::invalid_argument(
        std::string(names.counts) + "[" + where + "] = " + std::to_string(count) +
        " is not between 0 and the width " + std::to_string(lists.width) + " of " + names.indices);
  }
  const int32_t* indices = lists.indices + row * lists.width;
  for (int64_t i = 0; i < count; ++i) {
    const std::string entry = std::string(names.indices) + "[" + where + ", " + std::to_string(i) +
                              "] = " + std::to_string(indices[i]);
    if (indices[i] < 0 || indices[i] >= limit) {
      throw std::invalid_argument(entry + " is out of range: the layout has " +
                                  std::to_string(limit) + " " + names.values);
    }
    if (i > 0 && indices[i] <= indices[i - 1]) {
      throw std::invalid_argument(entry + " follows " + std::to_string(indices[i - 1]) +
                                  ": indices must be strictly ascending");
    }
  }
  throw std::invalid_argument(std::string(names.indices) + " changed while it was read");
}

void check_lists(const IndexLists& lists, const ListNames& names, int64_t limit,
                 const Parallel& parallel) {
  if (!lists.present()) return;
  const int64_t num_rows = lists.batch * lists.heads * lists.rows;
  constexpr int64_t kEntriesPerTask = 1 << 15;
  const int64_t rows_per_task = std::max<int64_t>(1, kEntriesPerTask / (lists.width + 8));
  const int64_t num_tasks = (num_rows + rows_per_task - 1) / rows_per_task;
  std::atomic<int64_t> first_bad{std::numeric_limits<int64_t>::max()};
  const auto check_task = [&](int64_t task) {
    const int64_t end = std::min(num_rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) {
      if (is_valid_row(lists, row, limit)) continue;
      int64_t seen = first_bad.load();
      while (row < seen && !first_bad.compare_exchange_weak(seen, row)) {
      }
      return;
    }
  };
  if (num_tasks > 1) {
    parallel.run(num_tasks, check_task);
  } else if (num_tasks == 1) {
    check_task(0);
  }
  if (first_bad < num_rows) report_row(lists, names, first_bad, limit);
}

void check_per_head(const PerHead& values, const char* name, int32_t minimum) {
  for (int64_t h = 0; h < values.heads; ++h) {
    if (values.data[h] < minimum) {
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(h) +
                                  "] = " + std::to_string(values.data[h]) + " is less than " +
                                  std::to_string(minimum));
    }
  }
}

}  // namespace

void check_layout(const AttentionParams& params, const Parallel& parallel) {
  check_per_head(params.sink, "sink", 0);
  check_per_head(params.window, "window", -1);
  const int64_t num_blocks = (params.seqlen_kv + params.block_kv - 1) / params.block_kv;
  check_lists(params.blocks, {"kv_num_blocks", "kv_indices", "key blocks"}, num_blocks, parallel);
  check_lists(params.columns, {"num_columns", "column_indices", "keys"}, params.seqlen_kv,
              parallel);
}

}  // namespace sparse_attn::cpu
