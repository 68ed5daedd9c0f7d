"""A call as the C ABI takes it: ``tilewise_call`` of csrc/api.h, field for field."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...philox import keep_threshold
from ...problem import Inputs, Plan, Problem
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
        ("d_lse", _POINTER),
        ("d_lse_stride", _I64 * 3),
        ("delta", _POINTER),
        *((name, CTensor) for name in ("d_q", "d_k", "d_v")),
        ("d_q_parts", _POINTER),
        ("chunks", _I64),
        *((name, _POINTER) for name in ("d_relative_bias", "d_alibi", "d_bias")),
        ("d_bias_stride", _I64 * 5),
        ("d_bias_shared", _I32),
    )


_MASKS = {"none": _BAND, "band": _BAND, "ranges": _RANGES, "bitmap": _BITMAP}
MOST_LAYOUTS = 64
"""A model lays out the calls of one problem in one or two ways."""

Layout = tuple[Any, ...]
"""The strides of q, k, v and out; in the backward followed by d_out's strides and dtype."""

TENSORS = ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")
"""The tensors that every call has, the last four in the backward only."""


@dataclass(frozen=True)
class NativePlan(Plan):
    """A plan that remembers the calls laid out under it, by the layout of their tensors.

    What a ``Call`` says beyond addresses follows from its problem, whose plan this is, and from the
    strides and dtypes of its ``TENSORS``. The key is those that callers choose: d_q, d_k and d_v
    are ``empty_like`` of q, k and v. The template is such a call as bytes, and whether there is
    more to fill in than the dense tensors and a band. ``parts`` are those of ``native.parts``, of a
    call whose bias gradient is not shared.
    """

    parts: int
    templates: dict[Layout, tuple[bytes, bool]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def remember(
        self, problem: Problem, layout: Layout, tensors: tuple[Tensor, ...]
    ) -> tuple[bytes, bool]:
        """Make the template of a layout that is new, from ``TENSORS`` that have it."""
        if len(self.templates) >= MOST_LAYOUTS:
            self.templates.clear()
        made = self.templates[layout] = _template(problem, tensors)
        return made


def describe(
    plan: NativePlan,
    problem: Problem,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, ...] = (),
) -> tuple[Call, list[Any]]:
    """A call, and the tensors made for it, which must live as long as it runs.

    ``gradients`` are the backward's d_out, d_q, d_k and d_v. The call is a copy of its template, so
    that several Python threads may be in here; what is set here may differ between two calls of one
    template.
    """
    q, k, v, mask = inputs[:4]
    layout: Layout = (q.stride(), k.stride(), v.stride(), out.stride())
    if gradients:
        d_out, d_q, d_k, d_v = gradients
        layout += (d_out.stride(), d_out.dtype)
    template, has_options = plan.templates.get(layout) or plan.remember(
        problem, layout, (q, k, v, out, *gradients)
    )
    call = Call.from_buffer_copy(template)
    call.q.data, call.k.data, call.v.data = q.data_ptr(), k.data_ptr(), v.data_ptr()
    call.out.data, call.lse = out.data_ptr(), lse.data_ptr()
    if gradients:
        call.d_out.data, call.d_q.data = d_out.data_ptr(), d_q.data_ptr()
        call.d_k.data, call.d_v.data = d_k.data_ptr(), d_v.data_ptr()
    call.threads = torch.get_num_threads()
    call.scale = problem.scale  # equal problems may differ in it: 0.0 == -0.0
    if isinstance(mask, Band):
        call.mask_low, call.mask_high = mask.low, mask.high
    return call, _fill_options(call, problem, inputs) if has_options else []


def _template(problem: Problem, tensors: tuple[Tensor, ...]) -> tuple[bytes, bool]:
    call = Call()
    call.batch, call.q_heads, call.kv_heads = problem.batch, problem.q_heads, problem.kv_heads
    call.q_len, call.kv_len = problem.q_len, problem.kv_len
    call.head_dim, call.v_dim = problem.head_dim, problem.v_dim
    call.softcap, call.mask_kind = problem.softcap, _MASKS[problem.mask]
    for name, x in zip(TENSORS, tensors, strict=False):
        dense = getattr(call, name)
        dense.stride[:], dense.dtype = x.stride(), _DTYPES[x.dtype]
    has_options = call.mask_kind != _BAND or bool(
        problem.bias
        or problem.alibi
        or problem.relative_bias
        or problem.sinks
        or problem.dropout_p
        or problem.page_size
    )
    return bytes(call), has_options


def _broadcast(x: Tensor, shape: tuple[int, ...]) -> CTensor:
    """``x`` as the library sees it, its strides those of ``x`` broadcast to ``shape``."""
    stride = x.expand(shape).stride()
    padded = (*stride, *(0,) * (4 - len(stride)))
    return CTensor(x.data_ptr(), (_I64 * 4)(*padded), _DTYPES[x.dtype])


def _fill_options(call: Call, problem: Problem, inputs: Inputs) -> list[Any]:
    """The optional tensors, dropout and the mask; returns what must live as long as the call."""
    alive: list[Any] = []

    def kept(x: Tensor) -> Tensor:
        alive.append(x)
        return x

    heads = (problem.batch, problem.q_heads, problem.q_len)
    if (bias := inputs.bias) is not None:
        bias = (bias if bias.dtype in _DTYPES else bias.float()).resolve_neg()
        call.bias = _broadcast(kept(bias), (*heads, problem.kv_len))
    if inputs.alibi is not None:
        call.alibi = _broadcast(kept(inputs.alibi.resolve_neg().float()), heads)
    if inputs.relative_bias is not None:
        table = kept(inputs.relative_bias.resolve_neg().float().contiguous())
        call.relative_bias, call.relative_entries = table.data_ptr(), table.shape[1]
        call.relative_zero = problem.relative_zero
    if inputs.sinks is not None:
        call.sinks = kept(inputs.sinks.resolve_neg().float().contiguous()).data_ptr()
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
        return
    if isinstance(mask, Ranges):
        start, stop = kept(mask.start.contiguous()), kept(mask.stop.contiguous())
        call.mask_runs = start.shape[-1]
        call.mask_first, call.mask_second = start.data_ptr(), stop.data_ptr()
    else:
        start = kept(mask.codes.contiguous())
        words = kept(mask.words.contiguous())
        call.mask_first = start.data_ptr()
        call.mask_words = words.data_ptr()
    call.mask_stride[0] = _batch_stride(start)
    call.mask_stride[1] = start.stride(1) if start.shape[1] > 1 else 0


def _batch_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else 0
