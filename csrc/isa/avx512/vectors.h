// What the AVX-512 families share (F, DQ, BW, VL): 64-byte vectors, 32 registers.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kBytes = 64;
constexpr int kAccumulators = 24;
constexpr int kPanelVectors = 4;
constexpr int kStripVectors = 3;

}  // namespace

#include "../../generic/vector.h"

namespace {

Vec load_half(const std::uint16_t* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// vmaxps gives its second operand if either is NaN.
Vec larger(Vec candidate, Vec running) { return (Vec)_mm512_max_ps((__m512)candidate, (__m512)running); }

// vpmuludq multiplies every other lane: twice, and the halves are put together again.
Wide multiply_wide(IntVec a, std::uint32_t b) {
  const __m512i x = (__m512i)a, by = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(x, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), by);
  return {(IntVec)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)),
          (IntVec)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd)};
}

// As exp2_portable, in 9 instructions instead of 13: t = n + f, 0 <= f < 1, by vreduce; 2^n by vscalef.
// Degree-6 minimax polynomial for 2^f with p(0) = 1, relative error 2.0e-9 before rounding.
Vec exp2_vec(Vec t) {
  const __m512 x = (__m512)t;
  const Vec f = (Vec)_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = all(2.16129192e-4f);
  p = p * f + 1.24678458e-3f;
  p = p * f + 9.67545155e-3f;
  p = p * f + 5.54852821e-2f;
  p = p * f + 2.40229309e-1f;
  p = p * f + 6.93147063e-1f;
  p = p * f + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, x);
}

}  // namespace
