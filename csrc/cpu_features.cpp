// What this processor offers to kernels, and what the operating system lets us use of it.

#include <cstdint>
#include <string>

#include "api.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

void append(std::string& names, const char* name, bool present) {
  if (!present) return;
  if (!names.empty()) names += ' ';
  names += name;
}

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero when the processor does not know the leaf.
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool bit(std::uint64_t word, int index) { return ((word >> index) & 1u) != 0; }

// XCR0: the register states that the operating system saves on a context switch. Inline
// assembly because the _xgetbv intrinsic needs -mxsave, and this file is compiled for the baseline.
std::uint64_t saved_states() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE: without it xgetbv is an illegal instruction
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux enables the 8 KiB of AMX tile data for a process only after it has asked; elsewhere XCR0 says it all.
bool amx_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h, Linux 5.16
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return true;
#endif
}

std::string detect() {
  const std::uint64_t states = saved_states();
  const bool ymm = (states & 0x6) == 0x6;              // SSE, AVX
  const bool zmm = ymm && (states & 0xe0) == 0xe0;     // opmask, upper halves of ZMM0-15, ZMM16-31
  const bool tiles = (states & 0x60000) == 0x60000;    // tile configuration, tile data

  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  std::string names;
  append(names, "avx2", ymm && bit(extended.ebx, 5));
  append(names, "fma", ymm && bit(basic.ecx, 12));
  append(names, "f16c", ymm && bit(basic.ecx, 29));
  append(names, "avx512f", zmm && bit(extended.ebx, 16));
  append(names, "avx512dq", zmm && bit(extended.ebx, 17));
  append(names, "avx512bw", zmm && bit(extended.ebx, 30));
  append(names, "avx512vl", zmm && bit(extended.ebx, 31));
  append(names, "avx512_bf16", zmm && bit(more.eax, 5));
  append(names, "avx512_fp16", zmm && bit(extended.edx, 23));
  if (tiles && bit(extended.edx, 24) && amx_permitted()) {
    append(names, "amx_tile", true);
    append(names, "amx_int8", bit(extended.edx, 25));
    append(names, "amx_bf16", bit(extended.edx, 22));
    append(names, "amx_fp16", bit(more.eax, 21));
  }
  return names;
}

#elif defined(__aarch64__) && defined(__linux__)

std::string detect() {
  // Bit numbers from the kernel's asm/hwcap.h, written out because old headers lack the newer ones.
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  std::string names;
  append(names, "neon", (first >> 1) & 1u);
  append(names, "asimdhp", (first >> 10) & 1u);
  append(names, "asimddp", (first >> 20) & 1u);
  append(names, "asimdfhm", (first >> 23) & 1u);
  append(names, "i8mm", (second >> 13) & 1u);
  append(names, "bf16", (second >> 14) & 1u);
  append(names, "sve", (first >> 22) & 1u);
  append(names, "sve2", (second >> 1) & 1u);
  append(names, "sme", (second >> 23) & 1u);
  return names;
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool has(const char* key) {
  int value = 0;
  std::size_t size = sizeof(value);
  return sysctlbyname(key, &value, &size, nullptr, 0) == 0 && value != 0;
}

std::string detect() {
  std::string names;
  append(names, "neon", true);
  append(names, "asimdhp", has("hw.optional.arm.FEAT_FP16"));
  append(names, "asimddp", has("hw.optional.arm.FEAT_DotProd"));
  append(names, "asimdfhm", has("hw.optional.arm.FEAT_FHM"));
  append(names, "i8mm", has("hw.optional.arm.FEAT_I8MM"));
  append(names, "bf16", has("hw.optional.arm.FEAT_BF16"));
  append(names, "sme", has("hw.optional.arm.FEAT_SME"));
  return names;
}

#else

std::string detect() { return {}; }

#endif

}  // namespace

const char* tilewise_cpu_features(void) {
  static const std::string names = detect();
  return names.c_str();
}
