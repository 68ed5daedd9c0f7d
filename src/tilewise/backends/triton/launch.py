"""Launches of kernels: through Triton's own wrapper the first time, straight to the binary after.

The wrapper looks at every argument, builds a key from what it finds, compiles if the key is new,
and launches: about 16 microseconds of host time for a kernel of thirty arguments, of which the
launch itself is one. ``run`` keeps the compiled kernel under a key of its own that is cheaper to
build and at least as fine. It reads no device memory, waits for nothing and uses the current
stream, so that launches can be captured in a CUDA graph. Its host time has been measured with a
driver that does nothing, not yet on a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_KEPT = 4096
"""Kernels kept under their keys. Beyond it the cache starts anew, since new strides never end."""


class DoesNotFit(RuntimeError):
    """A kernel that could not be compiled for the device, or needs more than a block may have. It
    did not run; with other tiles it may."""


_kept: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""Key of a launch -> its compiled kernel, and its compile-time arguments in their order."""


def run(
    kernel: Any,
    grid: tuple[int, ...],
    architecture: str,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    """Launch ``kernel[grid](*arguments, **named)``; a failure names the kernel and its tile.

    ``arguments`` are the run-time arguments in order, ``named`` the compile-time ones, which come
    last in the kernel, and the options. Raises ``DoesNotFit`` if the kernel never ran.
    """
    try:
        if isinstance(kernel, JITFunction):
            _launch(kernel, grid, arguments, named)
        else:  # interpreted
            kernel[grid](*arguments, **named)
    except Exception as error:
        tile = ", ".join(f"{name}={value}" for name, value in named.items())
        name = getattr(kernel, "__name__", str(kernel))
        if does_not_fit(error):
            text = f"triton: {name} does not fit on {architecture} with {tile}: {error}"
            raise DoesNotFit(text) from error
        raise RuntimeError(f"triton: {name} failed on {architecture} with {tile}") from error


def does_not_fit(error: Exception) -> bool:
    """Whether a launch failed before the kernel ran, for a reason that lies in its tiles.

    An error of the device, such as an illegal address, may come from any earlier kernel and leaves
    the device unusable.
    """
    if isinstance(error, OutOfResources | PTXASError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "PassManager::run failed" in said or "out of resources" in said.lower()
    )


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    key = (kernel, driver.active.get_current_device(), *named.values(), *_key(kernel, arguments))
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        compiled = kernel[grid](*arguments, **named)
        constants = tuple(named[name] for name in kernel.arg_names[len(arguments) :])
        _kept[key] = compiled, constants
    else:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants)


def _key(kernel: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """What of the arguments Triton compiles a kernel for, or something finer: dtype and alignment
    of pointers, which are None, strides, integers that are specialised, the width of others."""
    key: list[Any] = []
    for argument, fixed in zip(arguments, _unspecialised(kernel), strict=False):
        kind = type(argument)
        if kind is int:
            key.append(-(2**31) <= argument < 2**31 if fixed else argument)
        elif kind is float:
            key.append(float)
        else:
            _add(key, argument)
    return key


def _add(key: list[Any], argument: Any) -> None:
    """Add the key of None, a tensor, strides (a plain tuple), a named tuple of such, or a tensor
    descriptor."""
    kind = type(argument)
    if argument is None or kind is tuple:
        key.append(argument)
    elif isinstance(argument, Tensor):
        key.append(argument.dtype)
        key.append(argument.data_ptr() & 15)
    elif isinstance(argument, tuple):
        for entry in argument:
            _add(key, entry)
    elif kind is TensorDescriptor:
        _add(key, argument.base)
        key.append((*argument.block_shape, argument.padding))
    else:
        raise TypeError(f"arguments: got a {kind.__name__}; a kernel takes tensors and numbers")


@lru_cache(maxsize=64)
def _unspecialised(kernel: Any) -> tuple[bool, ...]:
    """For each argument, whether its value is never compiled in."""
    return tuple(parameter.do_not_specialize for parameter in kernel.params)
