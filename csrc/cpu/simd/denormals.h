// The state of a thread while it runs a kernel.
#pragma once

#include "cpu/simd/standard_headers.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Flushes denormal results to zero while a kernel runs, but takes denormal numbers as they are.
static uint32_t enter_kernel() {
#if defined(__x86_64__)
  constexpr uint32_t kFlushResults = 0x8000, kFlushInputs = 0x40;
  const uint32_t saved = _mm_getcsr();
  _mm_setcsr((saved & ~kFlushInputs) | kFlushResults);
  return saved;
#else
  return 0;
#endif
}

static void leave_kernel(uint32_t saved) {
#if defined(__x86_64__)
  _mm_setcsr(saved);
#else
  (void)saved;
#endif
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
