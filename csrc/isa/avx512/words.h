// Vocabulary for AVX-512 (F, DQ, BW, VL).
#include "vectors.h"

namespace {

const char* const kIsa = "avx512";
constexpr bool kPairs = false, kTiles = false;
struct Session {};

void store_bfloat(std::uint16_t* p, Vec v) { store_bfloat_portable(p, v); }
IntVec pair_words(Vec even, Vec odd) { return pair_words_portable(even, odd); }

}  // namespace
