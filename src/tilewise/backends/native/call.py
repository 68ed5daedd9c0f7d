"""A call as the C ABI takes it: ``tilewise_call`` of csrc/api.h, field for field."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...philox import keep_threshold
from ...problem import Inputs, Problem
from ...tiles import Band, Ranges

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_BAND, _RANGES, _BITMAP = 0, 1, 2
_I32, _I64, _U32, _U64, _FLOAT, _POINTER = (
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_float,
    ctypes.c_void_p,
)


class CTensor(ctypes.Structure):
    """``tilewise_tensor``."""

    _fields_ = (("data", _POINTER), ("stride", _I64 * 4), ("dtype", _I32))


class Call(ctypes.Structure):
    """``tilewise_call``."""

    _fields_ = (
        *((name, _I64) for name in ("batch", "q_heads", "kv_heads", "q_len", "kv_len")),
        *((name, _I64) for name in ("head_dim", "v_dim")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
        *((name, CTensor) for name in ("q", "k", "v", "out")),
        ("lse", _POINTER),
        ("bias", CTensor),
        ("alibi", CTensor),
        ("relative_bias", _POINTER),
        *((name, _I64) for name in ("relative_entries", "relative_zero")),
        ("sinks", _POINTER),
        ("position", _POINTER),
        ("position_stride", _I64),
        ("page_table", _POINTER),
        *((name, _I64) for name in ("page_table_stride", "page_size", "pages")),
        *((name, _I32) for name in ("mask_kind", "mask_runs")),
        *((name, _I64) for name in ("mask_low", "mask_high")),
        *((name, _POINTER) for name in ("mask_first", "mask_second", "mask_words")),
        ("mask_stride", _I64 * 2),
        ("keep_factor", _FLOAT),
        ("seed", _U64),
        ("keep_threshold", _U32),
        ("threads", _I32),
        ("d_out", CTensor),
        ("delta", _POINTER),
        *((name, CTensor) for name in ("d_q", "d_k", "d_v")),
        ("d_q_parts", _POINTER),
        ("chunks", _I64),
        *((name, _POINTER) for name in ("d_relative_bias", "d_alibi", "d_bias")),
        ("d_bias_stride", _I64 * 5),
        ("d_bias_shared", _I32),
    )


def tensor(x: Tensor, shape: tuple[int, ...] | None = None) -> CTensor:
    """``x`` as the library sees it, its strides those of ``x`` broadcast to ``shape``."""
    stride = x.stride() if shape is None else x.expand(shape).stride()
    padded = (*stride, *(0,) * (4 - len(stride)))
    return CTensor(x.data_ptr(), (_I64 * 4)(*padded), _DTYPES[x.dtype])


def fill(call: Call, problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor) -> list[Any]:
    """Describe a call; returns the tensors made for it, which must live as long as it runs."""
    alive: list[Any] = []

    def kept(x: Tensor) -> Tensor:
        alive.append(x)
        return x

    call.batch, call.q_heads, call.kv_heads = problem.batch, problem.q_heads, problem.kv_heads
    call.q_len, call.kv_len = problem.q_len, problem.kv_len
    call.head_dim, call.v_dim = problem.head_dim, problem.v_dim
    call.scale, call.softcap = problem.scale, problem.softcap
    call.q, call.k, call.v = tensor(inputs.q), tensor(inputs.k), tensor(inputs.v)
    call.out, call.lse = tensor(out), lse.data_ptr()
    call.threads = torch.get_num_threads()
    heads = (problem.batch, problem.q_heads, problem.q_len)
    if (bias := inputs.bias) is not None:
        bias = kept(bias.float()) if bias.dtype not in _DTYPES else bias
        call.bias = tensor(bias, (*heads, problem.kv_len))
    if inputs.alibi is not None:
        call.alibi = tensor(kept(inputs.alibi.float()), heads)
    if inputs.relative_bias is not None:
        table = kept(inputs.relative_bias.float().contiguous())
        call.relative_bias, call.relative_entries = table.data_ptr(), table.shape[1]
        call.relative_zero = problem.relative_zero
    if inputs.sinks is not None:
        call.sinks = kept(inputs.sinks.float().contiguous()).data_ptr()
    if inputs.position is not None:
        position = kept(inputs.position.contiguous())
        call.position, call.position_stride = position.data_ptr(), _batch_stride(position)
    if inputs.page_table is not None:
        pages = kept(inputs.page_table.to(torch.int32).contiguous())
        call.page_table, call.page_table_stride = pages.data_ptr(), pages.stride(0)
        call.page_size, call.pages = inputs.k.shape[1], inputs.k.shape[0]
    if problem.dropout_p:
        assert inputs.seed is not None
        call.keep_factor = 1 / (1 - problem.dropout_p)
        call.seed = int(inputs.seed) % 2**64
        call.keep_threshold = keep_threshold(problem.dropout_p)
    _fill_mask(call, inputs, kept)
    return alive


def _fill_mask(call: Call, inputs: Inputs, kept: Any) -> None:
    mask = inputs.mask
    if isinstance(mask, Band):
        call.mask_kind, call.mask_low, call.mask_high = _BAND, mask.low, mask.high
        return
    if isinstance(mask, Ranges):
        start, stop = kept(mask.start.contiguous()), kept(mask.stop.contiguous())
        call.mask_kind, call.mask_runs = _RANGES, start.shape[-1]
        call.mask_first, call.mask_second = start.data_ptr(), stop.data_ptr()
    else:
        start = kept(mask.codes.contiguous())
        words = kept(mask.words.contiguous())
        call.mask_kind, call.mask_first = _BITMAP, start.data_ptr()
        call.mask_words = words.data_ptr()
    call.mask_stride[0] = _batch_stride(start)
    call.mask_stride[1] = start.stride(1) if start.shape[1] > 1 else 0


def _batch_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else 0
