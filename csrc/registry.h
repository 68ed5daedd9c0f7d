// The kernel families that were compiled in, as the entry points see them.
#ifndef TILEWISE_REGISTRY_H
#define TILEWISE_REGISTRY_H

#include "api.h"

struct tilewise_kernels {
  const char* isa;
  // False if memory ran out; nothing else can fail once a call has been checked.
  bool (*forward)(const tilewise_call&, tilewise_parallel_for);
  bool (*backward)(const tilewise_call&, tilewise_parallel_for);
};

extern const tilewise_kernels tilewise_baseline;
#if defined(__x86_64__)
extern const tilewise_kernels tilewise_avx2;
extern const tilewise_kernels tilewise_amx;
extern const tilewise_kernels tilewise_amx_fma;
extern const tilewise_kernels tilewise_avx512;
extern const tilewise_kernels tilewise_avx512_bf16;
#endif

#endif
