/* The C ABI of libtilewise: plain C types only, so that one shared library serves every Python and
 * every PyTorch. Raise TILEWISE_ABI_VERSION whenever a signature or a meaning below changes; the
 * loader (src/tilewise/backends/native/library.py) refuses a library of another version. */
#ifndef TILEWISE_API_H
#define TILEWISE_API_H

#include <stdint.h>

#define TILEWISE_ABI_VERSION 3

#if defined(_WIN32)
#define TILEWISE_EXPORT __declspec(dllexport)
#else
#define TILEWISE_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* TILEWISE_ABI_VERSION as it was when the library was compiled. */
TILEWISE_EXPORT int tilewise_abi_version(void);

/* Instruction-set extensions this process may use, separated by single spaces, named as Linux names
 * them in /proc/cpuinfo (on AArch64: the hwcap names, with "neon" for the baseline). A name appears
 * only if the processor has it and the operating system saves its registers. On Linux the first call
 * asks the kernel for the use of AMX tiles. The string is static; never free it. */
TILEWISE_EXPORT const char* tilewise_cpu_features(void);

/* Kernel families this processor can run, best first, separated by single spaces. Static string. */
TILEWISE_EXPORT const char* tilewise_isas(void);

/* A function that runs func(first, last, context) over parts of [begin, end), such as PyTorch's
 * torch_parallel_for: the library has no threads of its own. NULL runs everything on the caller. */
typedef void (*tilewise_range)(int64_t first, int64_t last, void* context);
typedef int (*tilewise_parallel_for)(int64_t begin, int64_t end, int64_t grain, tilewise_range func,
                                     void* context);
TILEWISE_EXPORT void tilewise_set_parallel_for(tilewise_parallel_for parallel_for);

enum tilewise_dtype { TILEWISE_FLOAT32 = 0, TILEWISE_FLOAT16 = 1, TILEWISE_BFLOAT16 = 2 };
enum tilewise_mask { TILEWISE_BAND = 0, TILEWISE_RANGES = 1, TILEWISE_BITMAP = 2 };

/* Up to four dimensions; strides count elements and may be 0 (broadcast) or negative. */
typedef struct {
  void* data;
  int64_t stride[4];
  int32_t dtype;
} tilewise_tensor;

/* One attention call. Pointers that do not apply are NULL. "float" arrays are contiguous. */
typedef struct {
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_dim;
  float scale, softcap;             /* softcap 0: none */
  tilewise_tensor q, k, v;          /* [batch, heads, len, dim]; paged k, v: [pages, size, heads, dim] */
  tilewise_tensor out;              /* [batch, q_heads, q_len, v_dim]; read by the backward */
  float* lse;                       /* [batch, q_heads, q_len]; read by the backward */
  tilewise_tensor bias;             /* [batch, q_heads, q_len, kv_len], strides 0 where it broadcasts */
  tilewise_tensor alibi;            /* float32 [batch, q_heads, q_len] */
  const float* relative_bias;       /* [q_heads, relative_entries] */
  int64_t relative_entries, relative_zero;
  const float* sinks;               /* [q_heads] */
  const int64_t* position;          /* [batch or 1, q_len]: place of each query in the key index */
  int64_t position_stride;          /* between batch entries; position NULL: i + kv_len - q_len */
  const int32_t* page_table;        /* [batch, max_pages] */
  int64_t page_table_stride, page_size, pages;
  int32_t mask_kind, mask_runs;     /* mask_runs: 1 or 2 */
  int64_t mask_low, mask_high;      /* BAND: key j visible iff i + low <= j <= i + high */
  const int32_t* mask_first;        /* RANGES: starts [b, h, q_len, runs]; BITMAP: tile codes */
  const int32_t* mask_second;       /* RANGES: stops, laid out as the starts */
  const int64_t* mask_words;        /* BITMAP: [codes, 64] */
  int64_t mask_stride[2];           /* of mask_first and mask_second over batch and heads */
  float keep_factor;                /* dropout: 1 / (1 - p), by which kept weights grow; 0: none */
  uint64_t seed;
  uint32_t keep_threshold;          /* an entry is kept iff its Philox word is at least this */
  int32_t threads;
  /* Backward only. */
  tilewise_tensor d_out;
  const float* d_lse;               /* [batch, q_heads, q_len], or NULL for zeros */
  int64_t d_lse_stride[3];
  float* delta;                     /* result: rowsum(d_out * out) - d_lse, [batch, q_heads, q_len] */
  tilewise_tensor d_q, d_k, d_v;    /* results, in the dtype and shape of q, k and v */
  float* d_q_parts;                 /* [chunks, batch, q_heads, q_len, head_dim], if chunks > 1 */
  int64_t chunks;                   /* the keys are cut into so many independent parts */
  float* d_relative_bias;           /* [batch, q_heads, chunks, relative_entries], zeroed; or NULL */
  float* d_alibi;                   /* [batch, q_heads, chunks, q_len]; or NULL */
  float* d_bias;                    /* zeroed; or NULL */
  int64_t d_bias_stride[5];         /* over batch, heads, queries, keys (0 where shared), and chunks */
  int32_t d_bias_shared;            /* batch entries or heads add to the same numbers: run them in order */
} tilewise_call;

/* Run a call with the kernels of one family. Return 0, or else a static message is available from
 * tilewise_error() on the same thread and nothing was written. */
TILEWISE_EXPORT int tilewise_forward(const tilewise_call* call, const char* isa);
TILEWISE_EXPORT int tilewise_backward(const tilewise_call* call, const char* isa);
TILEWISE_EXPORT const char* tilewise_error(void);

/* The family whose kernels this thread ran last, as those kernels name themselves; "" before any. */
TILEWISE_EXPORT const char* tilewise_last_isa(void);

/* sizeof(tilewise_call), so that the caller can check its own idea of the layout. */
TILEWISE_EXPORT int64_t tilewise_call_size(void);

#ifdef __cplusplus
}
#endif

#endif
