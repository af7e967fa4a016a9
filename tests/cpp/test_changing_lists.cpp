// Whatever another thread writes into the lists of a call, the call gives the result of the lists
// that it has checked, or refuses them. Buffers have their exact sizes, so that AddressSanitizer
// sees any access outside of them.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <vector>

#include "calls.h"

namespace {

std::vector<std::vector<float>> results_of(const Call& call) {
  std::vector<std::vector<float>> results;
  for (const std::vector<float>* result : call.results) results.push_back(*result);
  return results;
}

// Overwrites one list before the first, the second, ... time that a call goes parallel.
void check_changed_lists(Isa isa) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  int64_t num_changes = 0;
  for_each_call([&](Call& call) {
    call.run(isa, one_after_the_other(2));
    const auto expected = results_of(call);
    for (const auto& [list_name, list] : call.lists) {
      const std::vector<int32_t> right = *list;
      for (const int32_t wrong : {kMost, -(1 << 30), 1 << 20}) {
        bool changed = true;
        for (int64_t when = 0; changed; ++when) {
          changed = false;
          const auto change = [&, list = list](int64_t runs) {
            if (runs != when) return;
            std::fill(list->begin(), list->end(), wrong);
            changed = true;
          };
          try {
            call.run(isa, one_after_the_other(2, change));
            if (call.reads_a_copy() && results_of(call) != expected) {
              fail(call.name + " read " + list_name + " again after it was checked");
            }
          } catch (const std::invalid_argument&) {
          }
          *list = right;
          num_changes += changed;
        }
      }
    }
  });
  if (num_changes < 100) fail("hardly a call went parallel");
}

}  // namespace

int main() {
  for (int level = 0; level < sparse_attn::cpu::kNumIsas; ++level) {
    const Isa isa = static_cast<Isa>(level);
    if (!is_supported(isa)) continue;
    check_changed_lists(isa);
    std::printf("%s: lists may change\n", isa_name(isa));
  }
  return 0;
}
