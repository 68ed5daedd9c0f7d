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

Vec larger(Vec candidate, Vec running) { return candidate > running ? candidate : running; }
Vec exp2_vec(Vec t) { return exp2_portable(t); }
void store_bfloat(std::uint16_t* p, Vec v) { store_bfloat_portable(p, v); }
IntVec pair_words(Vec even, Vec odd) { return pair_words_portable(even, odd); }

}  // namespace
