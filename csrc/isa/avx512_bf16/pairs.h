// What the families with AVX512-BF16 share beyond AVX-512.
#include "../avx512/vectors.h"

namespace {

// sum + left.even * right.even + left.odd * right.odd; subnormal numbers count as 0.
Vec dot(IntVec left, IntVec right, Vec sum) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}

void store_bfloat(std::uint16_t* p, Vec v) {
  const __m256bh words = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &words, sizeof words);
}

IntVec pair_words(Vec even, Vec odd) {
  alignas(64) static const std::uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh words = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (IntVec)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)words);
}

// 32 columns of two rows of bfloat16 numbers, column by column as pairs.
template <class N>
void interleave_words(const N* even, const N* odd, IntVec pairs[2]) {
  alignas(64) static const std::uint16_t kOrder[2][32] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i low = _mm512_loadu_si512(even), high = _mm512_loadu_si512(odd);
  for (int i = 0; i < 2; ++i)
    pairs[i] = (IntVec)_mm512_permutex2var_epi16(low, _mm512_load_si512(kOrder[i]), high);
}

}  // namespace
