// What kernels use of the standard library. Instruction sets include it before they switch the
// target, as what a header defines is compiled for the target of its first inclusion.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
