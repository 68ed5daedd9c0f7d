#include "../../api.h"
#include "words.h"

#include "../../generic/kernels.h"
#include "../../registry.h"

const tilewise_kernels tilewise_amx = {kIsa, &run_forward_in_parts, &run_backward_in_parts};
// Tiles for bfloat16 alone: float16 and float32 by multiply-adds, as in the families without tiles.
const tilewise_kernels tilewise_amx_fma = {"amx_fma", &run_forward, &run_backward};
