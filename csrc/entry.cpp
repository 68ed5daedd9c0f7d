// The entry points: check what can be checked cheaply, find the kernel family, run it.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <string>

#include "api.h"
#include "registry.h"

namespace {

thread_local const char* last_error = "";
thread_local const char* last_isa = "";
std::atomic<tilewise_parallel_for> pool{nullptr};

bool has(const char* names, const char* wanted) {
  const std::string padded = std::string(" ") + names + " ";
  return padded.find(std::string(" ") + wanted + " ") != std::string::npos;
}

// Best first.
const tilewise_kernels* const kAll[] = {
#if defined(__x86_64__)
    &tilewise_amx, &tilewise_amx_fma, &tilewise_avx512_bf16, &tilewise_avx512, &tilewise_avx2,
#endif
    &tilewise_baseline,
};

bool detect(const tilewise_kernels& kernels) {
  const char* f = tilewise_cpu_features();
  const bool avx512 = has(f, "avx512f") && has(f, "avx512dq") && has(f, "avx512bw") && has(f, "avx512vl") &&
                      has(f, "fma") && has(f, "f16c");
  const bool is_amx = std::strcmp(kernels.isa, "amx") == 0 || std::strcmp(kernels.isa, "amx_fma") == 0;
#if defined(TILEWISE_EMULATE_AMX)
  if (is_amx) return avx512 && has(f, "avx512_bf16");
#endif
  if (is_amx)
    return avx512 && has(f, "avx512_bf16") && has(f, "amx_tile") && has(f, "amx_bf16");
  if (std::strcmp(kernels.isa, "avx512_bf16") == 0) return avx512 && has(f, "avx512_bf16");
  if (std::strcmp(kernels.isa, "avx512") == 0) return avx512;
  if (std::strcmp(kernels.isa, "avx2") == 0) return has(f, "avx2") && has(f, "fma") && has(f, "f16c");
  return true;
}

constexpr std::size_t kFamilies = sizeof kAll / sizeof kAll[0];

// Asked by every call, so found out once.
bool runs_here(std::size_t family) {
  static const auto found = [] {
    std::array<bool, kFamilies> each{};
    for (std::size_t i = 0; i < kFamilies; ++i) each[i] = detect(*kAll[i]);
    return each;
  }();
  return found[family];
}

int fail(const char* message) {
  last_error = message;
  return 1;
}

bool is_sane(const tilewise_tensor& t) {
  return t.data != nullptr && t.dtype >= TILEWISE_FLOAT32 && t.dtype <= TILEWISE_BFLOAT16;
}

const char* problem_of(const tilewise_call& c, bool backward) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;  // positions and keys are 32-bit inside
  if (c.batch < 1 || c.q_heads < 1 || c.kv_heads < 1 || c.q_len < 1 || c.kv_len < 1)
    return "batch, heads and lengths must be at least 1";
  if (c.head_dim < 1 || c.v_dim < 1) return "head_dim and v_dim must be at least 1";
  if (c.q_heads % c.kv_heads != 0) return "q_heads must be a multiple of kv_heads";
  if (c.q_len >= kMost / 2 || c.kv_len >= kMost / 2) return "lengths must be below 2^30";
  if (!is_sane(c.q) || !is_sane(c.k) || !is_sane(c.v) || !is_sane(c.out)) return "q, k, v or out is missing";
  if (c.lse == nullptr) return "lse is missing";
  if (c.bias.data != nullptr && !is_sane(c.bias)) return "bias has an unknown dtype";
  if (c.relative_bias != nullptr && c.relative_entries < 1) return "relative_bias has no entries";
  if (c.page_table != nullptr && (c.page_size < 1 || c.pages < 1)) return "a paged cache needs pages";
  if (c.mask_kind < TILEWISE_BAND || c.mask_kind > TILEWISE_BITMAP) return "unknown kind of mask";
  if (c.mask_kind == TILEWISE_RANGES &&
      (c.mask_first == nullptr || c.mask_second == nullptr || c.mask_runs < 1 || c.mask_runs > 2))
    return "a mask of ranges needs starts and stops of one or two runs";
  if (c.mask_kind == TILEWISE_BITMAP && (c.mask_first == nullptr || c.mask_words == nullptr))
    return "a bitmap needs codes and words";
  if (!(c.keep_factor == 0.0f || c.keep_factor >= 1.0f)) return "keep_factor must be 0 or at least 1";
  if (c.threads < 1) return "threads must be at least 1";
  if (!backward) return nullptr;
  if (c.page_table != nullptr) return "a paged cache has no backward";
  if (!is_sane(c.d_out) || !is_sane(c.d_q) || !is_sane(c.d_k) || !is_sane(c.d_v)) return "a gradient is missing";
  if (c.delta == nullptr) return "delta is missing";
  if (c.chunks < 1 || (c.chunks > 1 && c.d_q_parts == nullptr)) return "chunks need room for the parts of d_q";
  return nullptr;
}

int run(const tilewise_call* call, const char* isa, bool backward) {
  if (call == nullptr || isa == nullptr) return fail("call or isa is NULL");
  if (const char* message = problem_of(*call, backward)) return fail(message);
  for (std::size_t i = 0; i < kFamilies; ++i) {
    const tilewise_kernels* kernels = kAll[i];
    if (std::strcmp(kernels->isa, isa) != 0) continue;
    if (!runs_here(i)) return fail("this processor cannot run the kernels asked for");
    const auto run_kernels = backward ? kernels->backward : kernels->forward;
    last_isa = kernels->isa;
    return run_kernels(*call, pool.load()) ? 0 : fail("out of memory");
  }
  return fail("no kernels of that name were compiled in");
}

}  // namespace

extern "C" {

int tilewise_abi_version(void) { return TILEWISE_ABI_VERSION; }

int64_t tilewise_call_size(void) { return sizeof(tilewise_call); }

const char* tilewise_error(void) { return last_error; }

const char* tilewise_last_isa(void) { return last_isa; }

void tilewise_set_parallel_for(tilewise_parallel_for parallel_for) { pool = parallel_for; }

const char* tilewise_isas(void) {
  static const std::string names = [] {
    std::string found;
    for (std::size_t i = 0; i < kFamilies; ++i) {
      if (!runs_here(i)) continue;
      if (!found.empty()) found += ' ';
      found += kAll[i]->isa;
    }
    return found;
  }();
  return names.c_str();
}

int tilewise_forward(const tilewise_call* call, const char* isa) { return run(call, isa, false); }

int tilewise_backward(const tilewise_call* call, const char* isa) { return run(call, isa, true); }

}  // extern "C"
