// Vocabulary for AVX2 + FMA + F16C: 32-byte vectors, 16 registers.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kBytes = 32;
constexpr int kAccumulators = 12;
constexpr int kPanelVectors = 2;
constexpr int kStripVectors = 4;
const char* const kIsa = "avx2";
constexpr bool kPairs = false, kTiles = false;
struct Session {};

}  // namespace

#include "../../generic/vector.h"

namespace {

Vec load_half(const std::uint16_t* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

Wide multiply_wide(IntVec a, std::uint32_t b) {
  const __m256i x = (__m256i)a, by = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(x, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), by);
  return {(IntVec)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA),
          (IntVec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA)};
}

Vec larger(Vec candidate, Vec running) { return candidate > running ? candidate : running; }
Vec exp2_vec(Vec t) { return exp2_portable(t); }
void store_bfloat(std::uint16_t* p, Vec v) { store_bfloat_portable(p, v); }
IntVec pair_words(Vec even, Vec odd) { return pair_words_portable(even, odd); }

}  // namespace
