// One kernel family: included once by each isa/*/kernels.cpp, after that family's words.h, in a
// translation unit compiled for its instruction set. Everything but the entry points is anonymous.
#include "operands.h"
#include "rows.h"
#include "matmul.h"
#ifdef TILEWISE_TILE_REGISTERS
#include "tiles.h"
#endif
#include "strip.h"
#include "scores.h"
#include "few_rows.h"
#include "softmax.h"
#include "schedule.h"
#include "forward.h"
#include "forward_tasks.h"
#include "backward.h"
#ifdef TILEWISE_TILE_REGISTERS
#include "parts.h"
#include "parts_tasks.h"
#endif
