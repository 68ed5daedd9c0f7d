// The tile registers: eight of 16 rows of 64 bytes. Inline assembly, because the compilers' intrinsics take
// the register's number only as a literal, and GCC 12's tell the compiler nothing of the memory they read.
//
// With TILEWISE_EMULATE_AMX they are arrays, which shows on any processor with AVX512-BF16 whether the
// kernels are right, not how fast they are.
#include <atomic>

namespace {

#if defined(TILEWISE_EMULATE_AMX)

thread_local std::int32_t registers[8][16][16];
std::atomic<std::int64_t> tile_products{0};

struct Session {};

template <int R>
void tile_zero() {
  std::memset(registers[R], 0, sizeof registers[R]);
}
template <int R>
void tile_load(const void* from, std::int64_t row_bytes) {
  for (int i = 0; i < 16; ++i) std::memcpy(registers[R][i], static_cast<const char*>(from) + i * row_bytes, 64);
}
template <int R>
void tile_store(void* to, std::int64_t row_bytes) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * row_bytes, registers[R][i], 64);
}
// A subnormal number, of which a tile product makes 0.
Vec flushed(Vec x) { return (bits(x) & 0x7f800000) == 0 ? Vec{} : x; }

// Each row's sums of even and of odd numbers start from 0, by multiply-adds; they, and then C, are added together.
template <int C, int A, int B>
void tile_dot() {
  constexpr std::int32_t high = static_cast<std::int32_t>(0xffff0000);
  ++tile_products;
  Vec right[2][16];
  for (int p = 0; p < 16; ++p) {
    const IntVec words = load_int(registers[B][p]);
    right[0][p] = flushed(from_bits(words << 16));
    right[1][p] = flushed(from_bits(words & high));
  }
  for (int i = 0; i < 16; ++i) {
    const IntVec words = load_int(registers[A][i]);
    const Vec left[2] = {flushed(from_bits(words << 16)), flushed(from_bits(words & high))};
    Vec sum[2] = {};
    for (int p = 0; p < 16; ++p)
      for (int odd = 0; odd < 2; ++odd) {
        const __m512 factor = _mm512_set1_ps(left[odd][p]);
        sum[odd] = flushed((Vec)_mm512_fmadd_ps(factor, (__m512)right[odd][p], (__m512)sum[odd]));
      }
    const Vec result = flushed(flushed(from_bits(load_int(registers[C][i]))) + flushed(sum[0] + sum[1]));
    std::memcpy(registers[C][i], &result, sizeof result);
  }
}

#else

// Tiles must be configured in each thread, and released so that the system need not save them.
struct Session {
  Session() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64, "the layout of LDTILECFG's operand");
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Session() { asm volatile("tilerelease"); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

template <int R>
void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(R));
}
template <int R>
void tile_load(const void* from, std::int64_t row_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(R), "r"(from), "r"(row_bytes) : "memory");
}
template <int R>
void tile_store(void* to, std::int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(R), "r"(to), "r"(row_bytes) : "memory");
}
// C += A B, bfloat16 pairs along A's rows and B's columns; subnormal numbers count as 0.
template <int C, int A, int B>
void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace
