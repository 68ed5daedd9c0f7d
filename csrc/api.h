/* The C ABI of libtilewise: plain C types only, so that one shared library serves every Python and
 * every PyTorch. Raise TILEWISE_ABI_VERSION whenever a signature or a meaning below changes; the
 * loader (src/tilewise/backends/native/library.py) refuses a library of another version. */
#ifndef TILEWISE_API_H
#define TILEWISE_API_H

#define TILEWISE_ABI_VERSION 1

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

#ifdef __cplusplus
}
#endif

#endif
