// Arithmetic of sizes.
#pragma once

#include <cstdint>

namespace sparse_attn {

// n / d rounded up, for n >= 0 and d > 0.
inline int64_t ceil_div(int64_t n, int64_t d) { return n / d + (n % d != 0); }

}  // namespace sparse_attn
