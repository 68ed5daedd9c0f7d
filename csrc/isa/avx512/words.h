// Vocabulary for AVX-512 (F, DQ, BW, VL): 64-byte vectors, 32 registers.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kBytes = 64;
constexpr int kAccumulators = 24;
constexpr int kPanelVectors = 4;
constexpr int kStripVectors = 3;
const char* const kIsa = "avx512";

}  // namespace

#include "../../generic/vector.h"

namespace {

Vec load_half(const std::uint16_t* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

}  // namespace
