"""The only place that judges shapes, dtypes, devices and values of arguments.

Every message names the argument, says what came and what is needed. Values held in tensors
(``lengths``, ``cu_seqlens``, page tables) are read in eager calls; under ``torch.compile`` they are
asserted by the compiled program instead.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Those of bias, alibi, relative_bias and sinks; q, k and v may be ``FLOAT8`` as well."""
FLOAT8 = torch.float8_e4m3fn

Descales = tuple[Tensor | None, Tensor | None, Tensor | None]
"""q_descale, k_descale, v_descale."""


def check_dense(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k, v of ``attention``: ``[batch, heads, length, dim]`` with what they must share."""
    _check_qkv(q, k, v, ("q", "k", "v"), "[batch, heads, length, dim]")
    _check_equal("k", "batch", k.shape[0], q.shape[0])
    _check_heads(q.shape[1], k.shape[1], q.shape[3], k.shape[3], "k")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: batch, heads and length are {list(v.shape[:3])} but k's are {list(k.shape[:3])}; "
            f"they must be equal"
        )


def check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k, v of ``attention_varlen``: ``[total, heads, dim]``."""
    _check_qkv(q, k, v, ("q", "k", "v"), "[total, heads, dim]")
    _check_heads(q.shape[1], k.shape[1], q.shape[2], k.shape[2], "k")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v: total and heads are {list(v.shape[:2])} but k's are {list(k.shape[:2])}; "
            f"they must be equal"
        )


def check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """q and a contiguous cache of ``decode``: ``[batch, kv_heads, max_len, dim]``."""
    _check_qkv(q, k_cache, v_cache, ("q", "k_cache", "v_cache"), "[batch, heads, max_len, dim]")
    _check_equal("k_cache", "batch", k_cache.shape[0], q.shape[0])
    _check_heads(q.shape[1], k_cache.shape[1], q.shape[3], k_cache.shape[3], "k_cache")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache: batch, heads and length are {list(v_cache.shape[:3])} but k_cache's are "
            f"{list(k_cache.shape[:3])}; they must be equal"
        )


def check_pages(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, lengths: Tensor
) -> int:
    """q and a paged cache of ``decode``; returns the most keys that the table can hold."""
    layout = "[pages, page_size, kv_heads, dim]"
    _check_qkv(q, k_cache, v_cache, ("q", "k_cache", "v_cache"), layout)
    _check_heads(q.shape[1], k_cache.shape[2], q.shape[3], k_cache.shape[3], "k_cache")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache: pages, page_size and heads are {list(v_cache.shape[:3])} but k_cache's are "
            f"{list(k_cache.shape[:3])}; they must be equal"
        )
    _check_integers("page_table", page_table, q.device)
    if page_table.dim() != 2 or page_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"page_table: shape is {list(page_table.shape)}; it must be [batch, max_pages] with "
            f"batch {q.shape[0]}"
        )
    pages, size = k_cache.shape[:2]
    if size == 0:
        raise ValueError("k_cache: page_size is 0; it must be at least 1")
    check_lengths(lengths, q, page_table.shape[1] * size)
    first_key = torch.arange(page_table.shape[1], device=q.device) * size
    used = first_key < lengths.to(q.device).unsqueeze(1)
    wrong = used & ((page_table < 0) | (page_table >= pages))
    _require(
        ~wrong.any(),
        lambda: (
            f"page_table: entry {int(page_table[wrong][0])} is used by its sequence but there are "
            f"{pages} pages; it must be in [0, {pages})"
        ),
        "page_table: an entry in use is not a page of the cache",
    )
    return page_table.shape[1] * size


def check_lengths(lengths: object, q: Tensor, max_len: int) -> None:
    """``lengths [batch]`` of ``decode``, each between 0 and the room in the cache."""
    _check_integers("lengths", lengths, q.device)
    assert isinstance(lengths, Tensor)
    if tuple(lengths.shape) != (q.shape[0],):
        raise ValueError(
            f"lengths: shape is {list(lengths.shape)}; it must be [batch] = [{q.shape[0]}]"
        )
    if not is_deferred(lengths):  # one read, where comparisons would be four steps of a short call
        numbers = lengths.tolist()
        if numbers and not (min(numbers) >= 0 and max(numbers) <= max_len):
            raise ValueError(
                f"lengths: got {numbers}; each must be from 0 to the cache's {max_len} keys"
            )
        return
    torch._assert_async(
        ((lengths >= 0) & (lengths <= max_len)).all(),
        "lengths: a length is negative or beyond the cache",
    )


def check_cu_seqlens(name: str, cu_seqlens: object, x: Tensor) -> None:
    """Where packed sequences begin: from 0, never decreasing, to the number of tokens."""
    _check_integers(name, cu_seqlens, x.device)
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: shape is {list(cu_seqlens.shape)}; it must be [sequences + 1]")
    total = x.shape[0]
    ascending = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    _require(
        ascending & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total),
        lambda: (
            f"{name}: got {_shortened(cu_seqlens)}; it must start at 0, never decrease and end at "
            f"the {total} tokens of {'q' if name.endswith('q') else 'k'}"
        ),
        f"{name}: does not run from 0 up to the number of tokens",
    )


def longest(cu_seqlens: Tensor) -> int:
    """Length of the longest packed sequence; reads the data."""
    return int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if cu_seqlens.shape[0] > 1 else 0


def score_options(
    q: Tensor,
    *,
    bias: Tensor | None,
    alibi: Tensor | None,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    score_shape: tuple[int, int, int, int],
    sequences: int,
    distances: int,
) -> dict[str, Tensor | None]:
    """Check the score options and bring them to the shapes of ``problem.Inputs``."""
    heads = score_shape[1]
    options = {"bias": bias, "alibi": alibi, "relative_bias": relative_bias, "sinks": sinks}
    for name, x in options.items():
        if x is not None:
            _check_option(name, x, q.device)
    if bias is not None:
        _check_broadcast("bias", bias, score_shape, "[batch, q_heads, q_len, kv_len]")
        options["bias"] = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    if alibi is not None:
        words = "[q_heads] or [batch, q_heads]"
        _check_shape("alibi", alibi, (heads,), (sequences, heads), words=words)
        options["alibi"] = alibi.reshape(-1, heads, 1) if heads else alibi.reshape(1, 0, 1)
    if relative_bias is not None:
        words = "[q_heads, q_len + kv_len - 1]"
        _check_shape("relative_bias", relative_bias, (heads, max(distances, 0)), words=words)
    if sinks is not None:
        _check_shape("sinks", sinks, (heads,), words="[q_heads]")
    return options


def check_descales(q: Tensor, descales: Descales, batch: int, kv_heads: int) -> None:
    """float32 ``[kv_heads]`` or ``[batch, kv_heads]``, of float8 inputs alone; ``batch`` counts
    sequences in a packed call."""
    for name, x in zip(("q_descale", "k_descale", "v_descale"), descales, strict=True):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if q.dtype != FLOAT8:
            raise TypeError(f"{name}: given, but q's dtype is {q.dtype}; it must be {FLOAT8}")
        if x.dtype != torch.float32:
            raise TypeError(f"{name}: dtype is {x.dtype}; it must be float32")
        _check_device(name, x, q.device)
        words = "[kv_heads] or [batch, kv_heads]"
        _check_shape(name, x, (kv_heads,), (batch, kv_heads), words=words)


def joined_descales(descales: Descales) -> tuple[Tensor | None, Tensor | None]:
    """The factors of ``q . k`` and of the output ``[batch or 1, kv_heads, 1]``, from descales that
    have been checked; a gradient of theirs is refused."""
    names = ("q_descale", "k_descale", "v_descale")
    if torch.is_grad_enabled():
        refuse_gradient(dict(zip(names, descales, strict=True)))
    q, k, v = descales
    both = q * k if q is not None and k is not None else k if q is None else q
    both, v = (None if x is None else x.reshape(-1, x.shape[-1], 1) for x in (both, v))
    return both, v


def refuse_gradient(tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError for the first tensor of a float8 call that requires a gradient."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, but attention of {FLOAT8} inputs is forward only; "
                f"call it under torch.no_grad(), or widen q, k and v"
            )


def _check_qkv(q: object, k: object, v: object, names: tuple[str, str, str], layout: str) -> None:
    """Type, rank, dtype and device of the three."""
    rank = layout.count(",") + 1
    for name, x in zip(names, (q, k, v), strict=True):
        wanted = "[batch, heads, length, dim]" if name == "q" and rank == 4 else layout
        _check_float(name, x, (*DTYPES, FLOAT8))
        assert isinstance(x, Tensor)
        if x.dim() != rank:
            raise ValueError(
                f"{name}: expected {rank} dimensions {wanted}, got {x.dim()} "
                f"(shape {list(x.shape)})"
            )
    assert isinstance(q, Tensor)
    for name, x in zip(names[1:], (k, v), strict=True):
        assert isinstance(x, Tensor)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: dtype is {x.dtype} but q's is {q.dtype}; they must be equal")
        _check_device(name, x, q.device)


def _check_float(name: str, x: object, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: dtype is {x.dtype}; it must be {', '.join(most)} or {last}")


def _check_integers(name: str, x: object, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected an int tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: dtype is {x.dtype}; it must be int32 or int64")
    _check_device(name, x, device)


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: device is {x.device} but q's is {device}; they must be equal")


def _check_equal(name: str, what: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"{name}: {what} is {got} but q's is {wanted}; they must be equal")


def _check_heads(q_heads: int, kv_heads: int, q_dim: int, k_dim: int, k_name: str) -> None:
    """q's heads are a multiple of k's, and both have the same head_dim, at least 1."""
    if (kv_heads == 0) != (q_heads == 0) or (kv_heads and q_heads % kv_heads):
        raise ValueError(
            f"q: {q_heads} heads cannot share {kv_heads} kv heads; "
            f"q's head count must be a multiple of {k_name}'s"
        )
    if k_dim != q_dim:
        raise ValueError(f"{k_name}: head_dim is {k_dim} but q's is {q_dim}; they must be equal")
    if q_dim == 0:
        raise ValueError("q: head_dim is 0; it must be at least 1")


def check_scalars(scale: object, softcap: object, dropout_p: object) -> None:
    """Finite scale, positive softcap, dropout probability in [0, 1); NumPy's numbers are numbers.

    What passes can be given to ``float``.
    """
    if scale is not None and _finite(scale) is None:
        raise ValueError(f"scale: must be a finite number or None, got {scale!r}")
    if softcap is not None and (_finite(softcap) or 0.0) <= 0:
        raise ValueError(f"softcap: must be a positive finite number or None, got {softcap!r}")
    probability = _finite(dropout_p)
    if probability is None or not 0 <= probability < 1:
        raise ValueError(f"dropout_p: must be in [0, 1), got {dropout_p!r}")


def check_seed(seed: object, device: torch.device) -> None:
    """A seed of 64 bits: an int, NumPy's included, or one int64 in a tensor; None draws one."""
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(
                f"seed: a tensor seed must be one int64, got {seed.dtype} {list(seed.shape)}"
            )
        if seed.is_meta and device.type != "meta":
            raise ValueError(f"seed: device is meta but q's is {device}; it must hold a value")
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, (int, numbers.Integral)):
            raise TypeError(f"seed: must be an int, an int64 tensor or None, got {seed!r}")
        if not -(2**63) <= operator.index(seed) < 2**64:
            raise ValueError(f"seed: must fit in 64 bits, got {seed}")


def check_mask_tensor(mask: Tensor) -> None:
    """A mask that came as a tensor: bool, at most 4 dimensions."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: a tensor must have dtype bool, got {mask.dtype}; scores go to bias")
    if mask.dim() > 4:
        raise ValueError(f"mask: a tensor must have at most 4 dimensions, got {mask.dim()}")


def default_scale(head_dim: int) -> float:
    """``1 / sqrt(head_dim)`` ("Attention is all you need", equation 1)."""
    return 1.0 / math.sqrt(head_dim)


def _check_option(name: str, x: object, device: torch.device) -> None:
    _check_float(name, x)
    assert isinstance(x, Tensor)
    _check_device(name, x, device)


def _check_shape(name: str, x: Tensor, *wanted: tuple[int, ...], words: str) -> None:
    """``x`` has one of the ``wanted`` shapes, which ``words`` describes."""
    if tuple(x.shape) not in wanted:
        shapes = " or ".join(str(list(shape)) for shape in wanted)
        raise ValueError(f"{name}: shape is {list(x.shape)}; it must be {words} = {shapes}")


def _check_broadcast(name: str, x: Tensor, want: tuple[int, ...], words: str) -> None:
    """``x`` broadcasts to ``want``, which ``words`` describes."""
    fits = x.dim() <= len(want)
    if not fits or any(n not in (1, w) for n, w in zip(x.shape[::-1], want[::-1], strict=False)):
        raise ValueError(
            f"{name}: shape is {list(x.shape)}; it must broadcast to {words} = {list(want)}"
        )


def is_deferred(x: Tensor) -> bool:
    """Whether ``x`` cannot be read now: the call is being traced, or recorded as a CUDA graph."""
    recorded = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or recorded


def _require(condition: Tensor, message: Callable[[], str], traced_message: str) -> None:
    """Raise ValueError unless the bool tensor holds; where data is not to be read the program
    asserts it."""
    if is_deferred(condition):
        torch._assert_async(condition, traced_message)
    elif not bool(condition):
        raise ValueError(message())


def _shortened(x: Tensor) -> str:
    values = x.tolist()
    return str(values) if len(values) <= 10 else f"{values[:5]} ... {values[-4:]}"


def _finite(x: object) -> float | None:
    """A real number as a float; None if it is no finite number."""
    if isinstance(x, bool) or not isinstance(x, (int, float, numbers.Real)):
        return None
    try:
        value = float(x)
    except OverflowError:
        return None
    return value if abs(value) <= sys.float_info.max else None
