#include "cpu/isa/isa.h"

#include "cpu/isa/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sparse_attn::cpu {

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels, kAmxKernels;
#endif

namespace {

#if defined(__x86_64__) && defined(__linux__)
// True when the processor has bf16 tiles and the kernel grants this process their state.
bool request_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool has_tiles = (edx >> 22 & 1) && (edx >> 24 & 1);
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif defined(__x86_64__)
bool request_amx() { return false; }
#endif

#if defined(__x86_64__)
bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  return has;
}

bool has_avx512() {
  static const bool has = has_avx2() && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}

bool has_avx512_bf16() {
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return has;
}

bool has_amx() {
  static const bool has = has_avx512_bf16() && request_amx();
  return has;
}
#endif

struct Row {
  bool (*is_supported)() = [] { return false; };
  const Kernels* kernels = nullptr;
};

constexpr Row kRows[kNumIsas] = {
    {[] { return true; }, &kGenericKernels},
#if defined(__x86_64__)
    {has_avx2, &kAvx2Kernels},
    {has_avx512, &kAvx512Kernels},
    {has_avx512_bf16, &kAvx512Bf16Kernels},
    {has_amx, &kAmxKernels},
#endif
};

}  // namespace

bool is_supported(Isa isa) { return kRows[static_cast<int>(isa)].is_supported(); }

const Kernels* kernels_of(Isa isa) { return kRows[static_cast<int>(isa)].kernels; }

Isa best_isa() {
  for (int level = kNumIsas - 1; level > 0; --level) {
    if (is_supported(static_cast<Isa>(level))) return static_cast<Isa>(level);
  }
  return Isa::kGeneric;
}

}  // namespace sparse_attn::cpu
