#include "../../api.h"
#include "words.h"

#include "../../generic/kernels.h"
#include "../../registry.h"

const tilewise_kernels tilewise_amx = {kIsa, &run_forward, &run_backward};
