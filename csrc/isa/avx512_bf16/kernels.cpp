#include "../../api.h"
#include "words.h"

#include "../../generic/kernels.h"
#include "../../registry.h"

const tilewise_kernels tilewise_avx512_bf16 = {kIsa, &run_forward, &run_backward};
