// The forward kernels in the emulator: random problems against float64, and proof that a kernel
// with a fault is found out. A fault is a barrier, wait, commit or copy that is left out, or an
// access that goes to a wrong address: another row of a fragment, a row behind the last one, the
// next entry of a list, the other stage.
#include <map>

#include "emulated_problem.h"

namespace sparse_attn::testing {
namespace {

int failures = 0;

void expect(bool is_right, const std::string& what) {
  failures += !is_right;
  if (!is_right) std::printf("FAILED %s\n", what.c_str());
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

void add_lists(Problem& problem, double blocks, double columns) {
  const ForwardParams& params = problem.params;
  const int64_t rows = ceil_divide(params.seqlen_q, params.block_q);
  if (blocks >= 0) {
    problem.blocks.make(choose({int64_t{1}, params.batch}), choose({int64_t{1}, params.num_heads}),
                        rows, ceil_divide(params.seqlen_kv, params.block_kv), blocks);
  }
  if (columns >= 0) {
    problem.columns.make(choose({int64_t{1}, params.batch}),
                         choose({int64_t{1}, params.num_kv_heads}),
                         ceil_divide(rows, params.column_group), params.seqlen_kv, columns);
  }
}

void add_biases(Problem& problem) {
  const ForwardParams& params = problem.params;
  problem.bias_batch = choose({int64_t{1}, params.batch});
  problem.bias_heads = choose({int64_t{1}, params.num_kv_heads, params.num_heads});
  problem.bias.resize(problem.bias_batch * problem.bias_heads * params.seqlen_kv * 3, NAN);
  for (size_t i = 1; i < problem.bias.size(); i += 3) problem.bias[i] = choose({-1.f, 0.5f, 2.f});
}

void add_slopes(Problem& problem) {
  for (int64_t h = 0; h < problem.params.num_heads; ++h) {
    problem.slopes.push_back(choose({0.01f, 0.25f, -0.02f}));
  }
}

Problem random_call() {
  const int64_t kv_heads = random_int(1, 2), heads = kv_heads * random_int(1, 3);
  Problem problem(choose({DType::kBFloat16, DType::kFloat16}), random_int(1, 2), heads, kv_heads,
                  choose<int64_t>({0, 1, 5, 64, 97, 150}),
                  choose<int64_t>({0, 1, 31, 64, 100, 190}), choose<int64_t>({8, 40, 64, 64, 128}),
                  choose<int64_t>({8, 48, 64, 64, 96}), kAlignment);
  ForwardParams& params = problem.params;
  params.is_causal = random_int(0, 1);
  params.scale = choose({0.25f, 0.1f, 0.0f, -0.2f});
  params.softcap = choose({0.0f, 0.0f, 3.0f});
  params.block_q = choose<int64_t>({7, 48, 64, 128, 1 << 30});
  params.block_kv = choose<int64_t>({1, 16, 48, 64, 128, 1 << 30});
  params.column_group = random_int(1, 3);
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  problem.sink.assign(choose({int64_t{1}, heads}), choose({0, 0, 5, kMost}));
  problem.window.assign(choose({int64_t{1}, kv_heads}), choose({0, 0, 1, 20, -1, kMost}));
  if (random_int(0, 3) == 0) problem.sinks.assign(heads, 0.5f);
  if (random_int(0, 2) == 0) add_biases(problem);
  if (random_int(0, 2) == 0) add_slopes(problem);
  add_lists(problem, choose({-1.0, 0.1, 0.5, 1.0}), choose({-1.0, -1.0, 0.05, 0.3}));
  return problem;
}

// In tiles of 64 rows and 64 keys with a head_dim of 64.
int64_t cost(const Problem& problem) {
  const ForwardParams& params = problem.params;
  const int64_t rows = ceil_divide(params.seqlen_q, std::min<int64_t>(params.block_q, 64));
  const int64_t most_dim = std::max(params.head_dim, params.head_dim_v);
  return params.batch * params.num_heads * rows * ceil_divide(params.seqlen_kv, 64) *
         (most_dim > 64 ? 2 : 1);
}

void check_random_calls(int count) {
  for (int i = 0; i < count; ++i) {
    Problem problem = random_call();
    while (cost(problem) > 60) problem = random_call();
    const std::string found = fault(problem, {.seed = static_cast<uint64_t>(i + 1)});
    expect(found.empty(), Problem::text("call %d: ", i) + found);
  }
  std::printf("%d random calls\n", count);
}

// Whatever the lists hold, kernels read within their tensors.
void check_garbage(int count) {
  for (int i = 0; i < count; ++i) {
    Problem problem(DType::kBFloat16, 1, 2, 1, 70, 100, 64, 64, kAlignment);
    problem.params.block_q = 64;
    problem.params.block_kv = choose<int64_t>({1, 48, 64});
    problem.params.is_causal = random_int(0, 1);
    problem.sink.assign(1, static_cast<int32_t>(random_int(INT32_MIN, INT32_MAX)));
    problem.window.assign(1, static_cast<int32_t>(random_int(INT32_MIN, INT32_MAX)));
    if (i % 2 == 0) problem.sink[0] = problem.window[0] = 0;
    add_lists(problem, 0.5, 0.2);
    for (auto* values : {&problem.blocks.counts, &problem.blocks.indices, &problem.columns.counts,
                         &problem.columns.indices}) {
      for (int32_t& x : *values) {
        x = static_cast<int32_t>(choose({random_int(INT32_MIN, INT32_MAX), random_int(-3, 110)}));
      }
    }
    const emulator::Report report = run_emulated(problem);
    expect(report.error.empty(), "garbage: " + report.error);
  }
  std::printf("%d calls with lists of garbage\n", count);
}

void check_refusals() {
  const auto refuses = [](const char* what, auto change) {
    Problem problem(DType::kBFloat16, 1, 1, 1, 64, 64, 64, 64, kAlignment);
    problem.sink.assign(1, 0);
    problem.window.assign(1, -1);
    change(problem);
    expect(!run_emulated(problem).error.empty(), std::string("not refused: ") + what);
  };
  refuses("float32", [](Problem& x) { x.params.dtype = DType::kFloat32; });
  refuses("head_dim", [](Problem& x) { x.params.head_dim = 136; });
  refuses("odd head_dim", [](Problem& x) { x.params.head_dim_v = 63; });
  refuses("odd stride", [](Problem& x) { x.k.strides.row = 68; });
  refuses("pages", [](Problem& x) { x.params.pages = x.sink.data(); });
  refuses("long sequences", [](Problem& x) { x.params.seqlen_kv = 1ll << 30; });
}

// What the kernels can do, in few tiles.
std::vector<Problem> telling_problems() {
  std::vector<Problem> problems;
  for (const bool is_causal : {true, false}) {
    Problem& problem =
        problems.emplace_back(DType::kBFloat16, 1, 2, 1, 130, 190, 64, 64, kAlignment);
    ForwardParams& params = problem.params;
    params.is_causal = is_causal;
    params.scale = 0.25f;
    params.block_q = 64;
    params.block_kv = 48;
    problem.sink = {5, 9};
    problem.window = {20, 7};
    add_lists(problem, 0.5, 0.1);
    if (is_causal) continue;
    params.softcap = 3.0f;
    problem.sinks = {0.5f, -0.5f};
    problem.slopes = {0.01f, 0.25f};
    add_biases(problem);
  }
  // Tiles that all rows see as a whole, and one that the first of few rows just sees as a whole.
  for (const auto& [seqlen, window] : {std::pair{200, -1}, std::pair{132, 70}}) {
    Problem& band =
        problems.emplace_back(DType::kBFloat16, 1, 1, 1, seqlen, seqlen, 64, 64, kAlignment);
    band.params.is_causal = true;
    band.params.scale = 0.1f;
    band.sink = {0};
    band.window = {window};
  }
  Problem& none = problems.emplace_back(DType::kBFloat16, 1, 1, 1, 64, 64, 64, 64, kAlignment);
  none.sink = {0};
  none.window = {0};
  return problems;
}

bool can_be_left_out(emulator::Op op) {
  using emulator::Op;
  return op == Op::kSyncBlock || op == Op::kSyncWarp || op == Op::kCopy || op == Op::kCommit ||
         op == Op::kWait;
}

// By how many bytes an address is made wrong: a row in shared memory or of a tensor, a chunk, an
// entry of a list. 0: it has no address.
int shift_of(emulator::Op op) {
  using emulator::Op;
  switch (op) {
    case Op::kLoadMatrices:
    case Op::kCopy:
      return 128;
    case Op::kLoadShared:
    case Op::kStoreShared:
    case Op::kStore:
      return 16;
    case Op::kLoad:
      return 4;
    default:
      return 0;
  }
}

void check_faults() {
  std::map<std::string, std::string> found;  // what was noticed, by fault
  for (Problem& problem : telling_problems()) {
    const emulator::Report good = run_emulated(problem);
    const std::string wrong = good.error.empty() ? problem.difference() : good.error;
    expect(wrong.empty(), "a telling problem: " + wrong);
    expect(good.counters.matrix_conflicts == 0, "ldmatrix meets bank conflicts");
    const auto plant = [&](const std::string& name, const emulator::Options& options) {
      std::string& noticed = found[name];
      if (noticed.empty()) noticed = fault(problem, options);
    };
    for (const auto& [site, calls] : good.sites) {
      const std::string name = emulator::describe(site);
      if (can_be_left_out(site.op)) plant("without " + name, {.skipped = site});
      if (const int shift = shift_of(site.op)) {
        plant(name + ", " + std::to_string(shift) + " bytes on", {.shifted = site, .shift = shift});
      }
    }
  }
  for (const auto& [name, noticed] : found) {
    std::printf("%s: %s\n", name.c_str(), noticed.empty() ? "NOT NOTICED" : noticed.c_str());
    expect(!noticed.empty(), name);
  }
}

int run(int count) {
  check_refusals();
  check_random_calls(count);
  check_garbage(count / 4);
  check_faults();
  std::printf("%d failed\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace sparse_attn::testing

int main(int argc, char** argv) {
  return sparse_attn::testing::run(argc > 1 ? std::atoi(argv[1]) : 100);
}
