"""Repairs of Triton's interpreter, for running the kernels on a CPU (``TRITON_INTERPRET=1``).

The interpreter executes a kernel's Python with NumPy. NumPy has no bfloat16 and no float8, so the
interpreter holds their bits in integers, and computes with the integers: products and sums of
bfloat16 are meaningless, and float32 is cut to bfloat16, not rounded (triton issues 11584, 11585).
``repair`` replaces the parts that are wrong:

* bfloat16, float8 e4m3 and e5m2 are widened to float32 before any arithmetic, and results are
  rounded to nearest even, as the hardware does; what is still not modelled raises;
* overflow, NaN and infinity raise no NumPy warning, as on a GPU;
* every address is checked: outside of the arguments' memory, or stored by one program and touched
  by another in the same launch (a race on a GPU), raises;
* Triton's functions are replaced once a launch, not at every call of a device function, which took
  half of the time of a forward pass.

Kernels must be imported with ``TRITON_INTERPRET=1`` set; ``repair`` may come before or after.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from .memory_watch import MemoryWatch

_FLOAT8 = {tl.float8e4nv: (4, 3, False), tl.float8e5: (5, 2, True)}
"""Exponent bits, mantissa bits, and whether the largest exponent is for infinity and NaN alone."""


def repair() -> None:
    """Repair the interpreter of this process; calling it again changes nothing."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: not set; there is no interpreter to repair")
    if type(interpreter.interpreter_builder) is Builder:
        return
    interpreter.interpreter_builder.__class__ = Builder
    interpreter._patch_lang = _patch_lang
    interpreter.GridExecutor = Launch
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.ReduceScanOpInterface.check_tensor = _check_reduced
    interpreter.ReduceOps.min_max = _min_max


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """uint16 bits of float32 ``x`` rounded to bfloat16, to nearest with ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    # Adding could carry a NaN into infinity; NaN keeps its upper bits and becomes quiet.
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(x.shape)


def float8_bits(x: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """uint8 bits of the float8 nearest to float32 ``x``, ties to even, saturating as
    ``cvt.rn.satfinite`` does; NaN stays NaN."""
    codes = _float8_values(dtype)[:128]
    finite = codes[np.isfinite(codes)].astype(np.float64)
    between = (finite[1:] + finite[:-1]) / 2
    size = np.abs(x).astype(np.float64)
    low, high = np.searchsorted(between, size, "left"), np.searchsorted(between, size, "right")
    code = np.where(low % 2 == 0, low, high)  # they differ on a tie only
    code = np.where(np.isnan(x), 127, code) | (np.signbit(x) * 128)
    return code.astype(np.uint8)


@lru_cache(maxsize=2)
def _float8_values(dtype: tl.dtype) -> np.ndarray:
    """The float32 value of each of the 256 codes."""
    exponent_bits, mantissa_bits, has_infinity = _FLOAT8[dtype]
    code = np.arange(256)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    value = np.where(exponent == 0, mantissa * 2.0, 1 + mantissa) * 2.0 ** (exponent - bias)
    if has_infinity:
        top = exponent == (1 << exponent_bits) - 1
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    else:
        value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code >= 128, -value, value).astype(np.float32)


def _is_narrow(dtype: tl.dtype) -> bool:
    """Whether NumPy has no such floating type."""
    return dtype.scalar.is_floating() and (
        dtype.scalar.is_bf16() or dtype.scalar.primitive_bitwidth == 8
    )


def _widen(handle: Any) -> np.ndarray:
    """The numbers in a handle, in a type that NumPy computes with."""
    dtype = handle.dtype.scalar
    if not _is_narrow(dtype):
        return handle.data
    if dtype.is_bf16():
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if dtype not in _FLOAT8:
        raise NotImplementedError(f"interpreter: {dtype} is not modelled; use fp8e4nv or fp8e5")
    return _float8_values(dtype)[handle.data]


def _handle(data: np.ndarray, dtype: tl.dtype) -> Any:
    """``data`` rounded to ``dtype``, as the interpreter holds it."""
    dtype = dtype.scalar
    if not _is_narrow(dtype):
        return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(dtype)), dtype)
    data = np.asarray(data).astype(np.float32)
    if dtype.is_bf16():
        return interpreter.TensorHandle(bfloat16_bits(data), dtype)
    if dtype not in _FLOAT8:
        raise NotImplementedError(f"interpreter: {dtype} is not modelled; use fp8e4nv or fp8e5")
    return interpreter.TensorHandle(float8_bits(data, dtype), dtype)


class Builder(interpreter.InterpreterBuilder):  # type: ignore[misc]
    """The interpreter's operations, right for narrow floats and with checked addresses."""

    watch: MemoryWatch | None = None

    def get_bf16(self, value: float) -> Any:
        return _handle(np.array([value], np.float32), tl.bfloat16)

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        if not _is_narrow(lhs.dtype):
            return super().binary_op(lhs, rhs, op)
        found = op(_widen(lhs), _widen(rhs))
        if found.dtype == np.bool_:  # a comparison; the interpreter labels it with lhs's type
            return interpreter.TensorHandle(found, lhs.dtype.scalar)
        return _handle(found, lhs.dtype)

    def unary_op(self, arg: Any, op: Any) -> Any:
        if not _is_narrow(arg.dtype):
            return super().unary_op(arg, op)
        return _handle(op(_widen(arg)), arg.dtype)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        return _handle(_widen(x) * _widen(y) + _widen(z), z.dtype)

    def create_rsqrt(self, arg: Any) -> Any:
        return _handle(1 / np.sqrt(_widen(arg)), arg.dtype)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if _is_narrow(src.dtype) or _is_narrow(dst_type):
            return _handle(_widen(src), dst_type)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return _handle(_widen(src), dst_type)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
        product = np.matmul(_widen(a), _widen(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def create_atomic_rmw(
        self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        if _is_narrow(val.dtype):
            raise NotImplementedError(f"interpreter: atomics of {val.dtype} are not modelled")
        if self.watch is not None:
            self.watch.inside(ptr.data, mask.data, val.data.dtype.itemsize)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_descriptor_reduce(self, kind: Any, desc: Any, value: Any, indices: Any) -> None:
        """The interpreter has none. Like the hardware, adds nothing outside of the tensor."""
        ir = interpreter._ir
        if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD or not value.dtype.scalar.is_fp32():
            raise NotImplementedError(f"interpreter: {kind} of {value.dtype} is not modelled")
        ptrs, mask = desc.materialize_pointers(indices)
        mask = interpreter.TensorHandle(mask, tl.int1)
        self.create_atomic_rmw(
            ir.ATOMIC_OP.FADD, ptrs, value, mask, ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU
        )

    def create_masked_load(self, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        if self.watch is not None:
            size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
            self.watch.load(ptrs.data, mask.data, size, self._program())
        return super().create_masked_load(ptrs, mask, *rest, **options)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if self.watch is not None:
            size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
            self.watch.store(ptrs.data, mask.data, size, self._program())
        return super().create_masked_store(ptrs, value, mask, *rest)

    def _program(self) -> int:
        """The running program's number, from 1."""
        (x, y, z), (_, wide, deep) = self.grid_idx, self.grid_dim
        return 1 + (x * wide + y) * deep + z


class Launch(interpreter.GridExecutor):  # type: ignore[misc]
    """One launch: its arguments' memory is watched and NumPy warns of nothing."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, named = super()._init_args_hst(args_dev, kwargs)
        tensors = list(_tensors([*args, *named.values()]))
        interpreter.interpreter_builder.watch = MemoryWatch(tensors, self.fn.__name__)
        return args, named

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            with np.errstate(all="ignore"):
                super().__call__(*args, **kwargs)
        finally:
            interpreter.interpreter_builder.watch = None


def _tensors(arguments: Iterable[Any]) -> Iterable[torch.Tensor]:
    """The tensors among a kernel's arguments."""
    for argument in arguments:
        argument = interpreter._unwrap_tensor(argument)
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, interpreter.TensorDescriptor):
            yield argument.base


_stock_patch_lang = interpreter._patch_lang


def _patch_lang(fn: Any) -> Any:
    """Replace Triton's functions by interpreted ones, unless that has been done in this launch."""
    if not tl.core.is_builtin(tl.core.load):
        return interpreter._LangPatchScope()
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = _stock_patch_lang(everything)
    # NumPy 2.4 refuses int() of a one-element array, which triton 3.6 relies on.
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    return scope


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    _patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except InterpreterError:
        raise
    except Exception as error:
        raise InterpreterError(f"{self.fn.__name__}: {error!r}") from error


_stock_check_tensor = interpreter.ReduceScanOpInterface.check_tensor


def _check_reduced(self: Any, given: Any) -> None:
    """Sums of narrow floats round at every step, in an order that only the compiler knows."""
    _stock_check_tensor(self, given)
    for tensor in given:
        if _is_narrow(tensor.dtype):
            raise NotImplementedError(
                f"interpreter: a reduction of {tensor.dtype} is not modelled; convert to float32"
            )


_stock_min_max = interpreter.ReduceOps.min_max
_QUIET = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}
"""The same results; nanmax and nanmin warn of a row of NaN."""


def _min_max(self: Any, given: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    quiet = _QUIET.get(val_reduce_op, val_reduce_op)
    return _stock_min_max(self, given, quiet, idx_reduce_op)
