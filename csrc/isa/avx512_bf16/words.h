// Vocabulary for AVX-512 with AVX512-BF16: its dot product takes two bfloat16 numbers a lane. On Zen 5 it
// issues as often as a multiply-add, which is twice the rate; on Intel's cores up to Sapphire Rapids half
// as often, which is the same rate.
#include "pairs.h"

namespace {

const char* const kIsa = "avx512_bf16";
constexpr bool kPairs = true, kTiles = false;
struct Session {};

}  // namespace
