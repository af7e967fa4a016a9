// Compares the CPU kernels with a double loop over rows and keys, on random layouts, data types,
// strides and instruction sets, and checks that broken layouts are refused.
//
//   make -C tests/cpp sanitize
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "gradients.h"
#include "problem.h"

namespace sparse_attn::testing {

namespace {

void expect_refusal(const char* message, const std::function<void(Problem&)>& damage, Isa isa) {
  Problem problem(DType::kFloat32, 1, 2, 1, 70, 90, 8, 8);
  problem.params.block_q = problem.params.block_kv = 16;
  problem.sink = {0, 0};
  problem.window = {0};
  problem.blocks.make(1, 2, 5, 6, 1.0);
  problem.columns.make(1, 1, 5, 90, 1.0);
  damage(problem);
  try {
    problem.run(isa);
  } catch (const std::invalid_argument& error) {
    if (std::string(error.what()).find(message) != std::string::npos) return;
    std::printf("expected '%s' but got '%s'\n", message, error.what());
    std::exit(1);
  }
  std::printf("not refused: %s\n", message);
  std::exit(1);
}

void check_refusals(Isa isa) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  const auto block = [](int64_t i, int32_t value) {
    return [=](Problem& p) { p.blocks.indices[i] = value; };
  };
  expect_refusal("kv_indices[0, 0, 0, 5] = 6 is out of range: the layout has 6 key blocks",
                 block(5, 6), isa);
  expect_refusal("kv_indices[0, 0, 0, 0] = -1", block(0, -1), isa);
  expect_refusal("kv_indices[0, 1, 4, 5]", block(59, kMost), isa);
  expect_refusal("kv_indices[0, 0, 0, 3] = 2 follows 2", block(3, 2), isa);
  expect_refusal("kv_num_blocks[0, 1, 0] = 7", [](Problem& p) { p.blocks.counts[5] = 7; }, isa);
  expect_refusal("kv_num_blocks[0, 0, 0] = -1", [](Problem& p) { p.blocks.counts[0] = -1; }, isa);
  expect_refusal(
      "column_indices[0, 0, 0, 89] = 90", [](Problem& p) { p.columns.indices[89] = 90; }, isa);
  expect_refusal("num_columns[0, 0, 4]", [](Problem& p) { p.columns.counts[4] = kMost; }, isa);
  expect_refusal("sink[1] = -1", [](Problem& p) { p.sink[1] = -1; }, isa);
  expect_refusal("window[0] = -2", [](Problem& p) { p.window[0] = -2; }, isa);
}

}  // namespace

}  // namespace sparse_attn::testing

int main(int argc, char** argv) {
  using namespace sparse_attn::testing;
  const int num_problems = argc > 1 ? std::atoi(argv[1]) : 150;
  for (int level = 0; level < sparse_attn::cpu::kNumIsas; ++level) {
    const Isa isa = static_cast<Isa>(level);
    if (!is_supported(isa)) continue;
    generator.seed(20240229);
    check_refusals(isa);
    for (int i = 0; i < num_problems; ++i) {
      Problem problem = random_problem(i % 4 == 0);
      problem.run(isa);
      const std::string name = std::string(isa_name(isa)) + ", problem " + std::to_string(i);
      problem.check(name);
      if (i % 4 == 1) problem.check_threads(isa, name);
      if (i % 4 == 2) {
        for (Tensor* x : {&problem.q, &problem.k, &problem.v}) x->poison();
        problem.run(isa);
        problem.check_threads(isa, name + " with numbers that are not finite");
        Gradients poisoned(problem);
        poisoned.run(isa, Problem::two_threads());
        poisoned.check_threads(isa, name + " with numbers that are not finite");
      }
      if (i % 2 == 0) continue;
      Gradients gradients(problem);
      gradients.run(isa, Problem::two_threads());
      gradients.check(name);
      if (i % 4 == 1) gradients.check_threads(isa, name);
    }
    std::printf("%s: %d random problems agree, broken layouts are refused\n", isa_name(isa),
                num_problems);
  }
  return 0;
}
