// Vocabulary for AMX-BF16: registers of 16 x 16 words, and a product of two of them in 16 cycles, 1024 FLOP
// a cycle. Vectors, and what does not fill a tile, are AVX512-BF16's, which every such processor has.
#include "../avx512_bf16/pairs.h"

#include "registers.h"
#define TILEWISE_TILE_REGISTERS

namespace {

const char* const kIsa = "amx";
constexpr bool kPairs = true, kTiles = true;

}  // namespace
