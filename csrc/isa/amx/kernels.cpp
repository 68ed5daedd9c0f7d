#include "../../api.h"
#include "words.h"

#include "../../generic/kernels.h"
#include "../../registry.h"

const tilewise_kernels tilewise_amx = {kIsa, &run_forward_in_parts, &run_backward_in_parts};
// Tiles for bfloat16 alone: float16 and float32 by multiply-adds, as in the families without tiles.
const tilewise_kernels tilewise_amx_fma = {"amx_fma", &run_forward, &run_backward};

#if defined(TILEWISE_EMULATE_AMX)
// Products of tile registers since the last call of this: tests ask which products run on them.
extern "C" TILEWISE_EXPORT int64_t tilewise_emulated_products() { return tile_products.exchange(0); }
#endif
