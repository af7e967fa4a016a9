#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sparse_attn::cpu {

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

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[kNumIsas] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c");
  static const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool amx = avx512_bf16 && request_amx();
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) return avx512;
  if (isa == Isa::kAvx512Bf16) return avx512_bf16;
  if (isa == Isa::kAmx) return amx;
#endif
  return isa == Isa::kGeneric;
}

Isa best_isa() {
  for (int level = kNumIsas - 1; level > 0; --level) {
    if (is_supported(static_cast<Isa>(level))) return static_cast<Isa>(level);
  }
  return Isa::kGeneric;
}

}  // namespace sparse_attn::cpu
