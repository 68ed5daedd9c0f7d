// Vocabulary for any processor: 16-byte vectors, which every compiler maps to SSE2, NEON or plain code.
#include <cstdint>
#include <cstring>

namespace {

constexpr int kBytes = 16;
constexpr int kAccumulators = 8;   // vectors that stay in registers during a tile product
constexpr int kPanelVectors = 2;   // vectors side by side in a tile product
constexpr int kStripVectors = 4;   // queries of a strip, in vectors
const char* const kIsa = "baseline";
constexpr bool kPairs = false;      // no bfloat16 dot product
constexpr bool kTiles = false;      // no registers that hold tiles
struct Session {};                  // nothing to set up in a thread before its tasks

}  // namespace

#include "../../generic/vector.h"

namespace {

Vec load_half(const std::uint16_t* p) { return load_half_portable(p); }

Wide multiply_wide(IntVec a, std::uint32_t b) { return multiply_wide_portable(a, b); }
Vec larger(Vec candidate, Vec running) { return candidate > running ? candidate : running; }
Vec exp2_vec(Vec t) { return exp2_portable(t); }
void store_bfloat(std::uint16_t* p, Vec v) { store_bfloat_portable(p, v); }
IntVec pair_words(Vec even, Vec odd) { return pair_words_portable(even, odd); }

}  // namespace
