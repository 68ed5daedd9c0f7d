"""The native library: C++ kernels behind a plain C ABI, loaded with ctypes on first use."""
