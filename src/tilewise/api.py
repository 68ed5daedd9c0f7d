"""The public calls. Each checks its arguments, lowers the mask, and hands over to one operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import (
    check_cache,
    check_cu_seqlens,
    check_dense,
    check_lengths,
    check_mask_tensor,
    check_packed,
    check_pages,
    check_scalars,
    default_scale,
    longest,
    score_options,
)
from .dispatch import BACKENDS, check_name, choose, reasons_against
from .explanation import Explanation
from .frame import Frame
from .lowering import lower
from .masks import Mask, from_bool
from .problem import Inputs, Problem
from .tiles import FULL, PARTIAL, SKIP


class _Call(NamedTuple):
    """A checked call: the tensors, and the rest of what a Problem is made from."""

    inputs: Inputs
    scalars: dict[str, Any]

    def problem(self) -> Problem:
        return Problem.of(self.inputs, **self.scalars)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention in O(N) memory.

    FlashAttention-2 (Dao, 2023, arXiv:2307.08691, Algorithms 1 and 2). The score of query i and
    key j is ``softcap(scale * q_i . k_j) + bias + alibi + relative_bias``, where
    ``softcap(s) = softcap * tanh(s / softcap)``.

    Args:
        q: ``[batch, q_heads, q_len, head_dim]``; float64, float32, float16, bfloat16; any strides.
        k: ``[batch, kv_heads, kv_len, head_dim]``; ``q_heads`` is a multiple of ``kv_heads`` and
            consecutive query heads share a kv head (GQA, MQA).
        v: ``[batch, kv_heads, kv_len, v_dim]``.
        mask: from ``tilewise.masks``, or a bool tensor (True: visible) that broadcasts to
            ``[batch, q_heads, q_len, kv_len]``. A query that sees no key gives output 0.
        bias: added to the scores; broadcasts to ``[batch, q_heads, q_len, kv_len]``. -inf hides.
        scale: factor on ``q . k``; default ``1 / sqrt(head_dim)``.
        softcap: positive cap on the scaled scores (Gemma 2).
        alibi: slopes ``[q_heads]`` or ``[batch, q_heads]``; adds
            ``-slope * |i + kv_len - q_len - j|`` (Press et al., 2021).
        relative_bias: ``[q_heads, q_len + kv_len - 1]``; adds entry ``(j - i') + kv_len - 1`` with
            ``i' = i + kv_len - q_len`` (T5, Swin) in O(N) memory.
        sinks: ``[q_heads]``, a logit that joins the denominator and has no value (gpt-oss).
        dropout_p: probability in [0, 1) with which a weight is dropped (Philox, see ``philox``).
        seed: int or int64 scalar tensor; None draws one from torch's default generator.
        return_lse: also return the log of the softmax denominator, sinks included.
        backend: ``"auto"``, or a name, which then runs or raises and never falls back.

    Returns:
        ``out [batch, q_heads, q_len, v_dim]`` in q's dtype and memory layout; with ``return_lse``
        also ``lse [batch, q_heads, q_len]``, natural log, float32 (float64 for float64), -inf where
        no key is visible (the sink's logit where there is one).

    Gradients flow to q, k, v, bias, alibi, relative_bias and sinks, from ``out`` and from ``lse``,
    the same bits every time.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: the backend asked for by name cannot run the call.
    """
    check_name(backend)
    call = _dense_call(
        q,
        k,
        v,
        mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        alibi=alibi,
        relative_bias=relative_bias,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
    )
    out, lse = ops.attention(call.inputs, backend=backend, **call.scalars)
    return (out, lse) if return_lse else out


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as the textbook writes it: the dense peer of ``attention``, same options.

    Plain PyTorch operations in the inputs' dtype, differentiated by autograd, with the whole score
    matrix in memory: O(N^2). Arguments, result and errors are those of ``attention``.
    """
    call = _dense_call(
        q,
        k,
        v,
        mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        alibi=alibi,
        relative_bias=relative_bias,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
    )
    from .backends import reference

    out, lse = reference.standard(call.problem(), call.inputs, with_lse=return_lse)
    return out if lse is None else (out, lse)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences of different lengths laid end to end, without padding.

    Args:
        q: ``[total_q, q_heads, head_dim]``.
        k: ``[total_k, kv_heads, head_dim]``.
        v: ``[total_k, kv_heads, v_dim]``.
        cu_seqlens_q: int32 or int64 ``[sequences + 1]``: where each sequence begins, from 0 to
            ``total_q``; equal neighbours are an empty sequence.
        cu_seqlens_k: the same for keys; default ``cu_seqlens_q``.
        mask: positions and lengths count within each sequence; ``documents`` ids run over the
            packed tokens.
        bias: broadcasts to ``[q_heads, total_q, total_k]``, in packed coordinates.
        alibi: ``[q_heads]`` or ``[sequences, q_heads]``.
        relative_bias: ``[q_heads, max_q + max_k - 1]`` for the longest sequences; entry
            ``(j - i') + max_k - 1`` is added. Needs the lengths, so it cannot be traced.

    The other arguments are those of ``attention``.

    Returns:
        ``out [total_q, q_heads, v_dim]``; with ``return_lse`` also ``lse [q_heads, total_q]``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: the backend asked for by name cannot run the call.
    """
    check_name(backend)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    check_packed(q, k, v)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k: describes {cu_seqlens_k.shape[0] - 1} sequences but cu_seqlens_q "
            f"{cu_seqlens_q.shape[0] - 1}; they must be equal"
        )
    if isinstance(mask, Tensor):
        raise TypeError("mask: packed calls take a mask from tilewise.masks, got a tensor")
    heads, total_q, total_k = q.shape[1], q.shape[0], k.shape[0]
    # Only the relative bias is as long as the longest sequence; nothing else reads the lengths.
    longest_q = longest_k = 0
    if relative_bias is not None:
        longest_q, longest_k = longest(cu_seqlens_q), longest(cu_seqlens_k)
    frame = Frame.packed(heads, total_q, total_k, cu_seqlens_q, cu_seqlens_k)
    options = score_options(
        q,
        bias=bias,
        alibi=alibi,
        relative_bias=relative_bias,
        sinks=sinks,
        score_shape=(1, heads, total_q, total_k),
        sequences=cu_seqlens_q.shape[0] - 1,
        distances=longest_q + longest_k - 1,
    )
    if alibi is not None and alibi.dim() == 2:  # one slope per sequence becomes one per row
        options["alibi"] = alibi[frame.row_sequence()[0]].T[None]
    call = _call(
        tuple(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        mask,
        frame,
        options,
        relative_zero=longest_k - 1,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=seed,
    )
    out, lse = ops.attention(call.inputs, backend=backend, **call.scalars)
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    page_table: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries over a key-value cache that is longer than it is full.

    The queries are the last ``q_len`` positions of each sequence: query i stands at
    ``i + lengths[b] - q_len``. Several new queries that must not see each other's successors need
    ``mask=masks.causal()``. Forward only.

    Args:
        q: ``[batch, q_heads, q_len, head_dim]``.
        k_cache: ``[batch, kv_heads, max_len, head_dim]``; with a page table
            ``[pages, page_size, kv_heads, head_dim]``, of any page size.
        v_cache: the same with ``v_dim``.
        lengths: int ``[batch]``: how many keys are valid, the new ones included; what lies beyond
            is never seen, whatever it holds.
        page_table: int32 ``[batch, max_pages]``: which page holds each run of ``page_size`` keys.
        bias: broadcasts to ``[batch, q_heads, q_len, max_len]``.
        relative_bias: ``[q_heads, q_len + max_len - 1]``.

    The other arguments are those of ``attention``; ``max_len`` is ``max_pages * page_size`` when
    paged.

    Returns:
        ``out [batch, q_heads, q_len, v_dim]``; with ``return_lse`` also ``lse``.

    Raises:
        ValueError, TypeError: an argument does not fit, or a gradient is asked for.
        UnsupportedError: the backend asked for by name cannot run the call.
    """
    check_name(backend)
    if page_table is None:
        check_cache(q, k_cache, v_cache)
        max_len = k_cache.shape[2]
    else:
        max_len = check_pages(q, k_cache, v_cache, page_table, lengths)
    check_lengths(lengths, q, max_len)
    batch, heads, q_len, _ = q.shape
    frame = Frame.cached(heads, q_len, max_len, lengths)
    options = score_options(
        q,
        bias=bias,
        alibi=alibi,
        relative_bias=relative_bias,
        sinks=sinks,
        score_shape=(batch, heads, q_len, max_len),
        sequences=batch,
        distances=q_len + max_len - 1,
    )
    call = _call(
        (q, k_cache, v_cache),
        mask,
        frame,
        options,
        relative_zero=max_len - 1,
        scale=scale,
        softcap=softcap,
        page_table=page_table,
    )
    if call.scalars["needs_grad"]:
        raise ValueError(
            "q: an input requires a gradient but decode is forward only; call it under "
            "torch.no_grad(), or use attention with masks.lengths"
        )
    out, lse = ops.attention(call.inputs, backend=backend, **call.scalars)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Explanation:
    """Which backend and plan ``attention`` gives this call, and why each other was passed over.

    Takes what ``attention`` takes, computes nothing and draws no random number. The answer comes
    from the function that the call itself asks.
    """
    check_name(backend)
    call = _dense_call(
        q,
        k,
        v,
        mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        alibi=alibi,
        relative_bias=relative_bias,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=0 if seed is None else seed,
    )
    problem = call.problem()
    plan = choose(problem, backend)
    counts = {"skipped": 0, "partial": 0, "full": 0}
    if not problem.is_empty:
        states = call.inputs.mask.table(plan.block_q, plan.block_kv)
        names = zip(counts, (SKIP, PARTIAL, FULL), strict=True)
        counts = {name: int((states == state).sum()) for name, state in names}
    reasons = reasons_against(problem)
    return Explanation(problem, plan, backend, {name: reasons[name] for name in BACKENDS}, counts)


def _dense_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    *,
    bias: Tensor | None,
    alibi: Tensor | None,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    **scalars: Any,
) -> _Call:
    check_dense(q, k, v)
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    options = score_options(
        q,
        bias=bias,
        alibi=alibi,
        relative_bias=relative_bias,
        sinks=sinks,
        score_shape=(batch, heads, q_len, kv_len),
        sequences=batch,
        distances=q_len + kv_len - 1,
    )
    frame = Frame.plain(batch, heads, q_len, kv_len, q.device)
    return _call((q, k, v), mask, frame, options, relative_zero=kv_len - 1, **scalars)


def _call(
    qkv: tuple[Tensor, ...],
    mask: Mask | Tensor | None,
    frame: Frame,
    options: dict[str, Any],
    *,
    relative_zero: int,
    scale: float | None,
    softcap: float | None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    page_table: Tensor | None = None,
) -> _Call:
    """What the three kinds of call share once their geometry is a Frame."""
    check_scalars(scale, softcap, dropout_p, seed, frame.device)
    if isinstance(mask, Tensor):
        check_mask_tensor(mask)
        mask = from_bool(mask)
    elif mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"mask: expected a tilewise.masks mask or a bool tensor, got {type(mask).__name__}"
        )
    positioned = options["alibi"] is not None or options["relative_bias"] is not None
    q, k, v = qkv
    inputs = Inputs(
        q,
        k,
        v,
        lower(mask, frame),
        seed=_seed(seed, frame.device) if dropout_p else None,
        position=frame.key_position() if positioned else None,
        page_table=page_table,
        **options,
    )
    differentiable = (*qkv, *options.values())
    scalars = {
        "scale": default_scale(q.shape[-1]) if scale is None else float(scale),
        "softcap": 0.0 if softcap is None else float(softcap),
        "dropout_p": float(dropout_p),
        "relative_zero": relative_zero,
        "needs_grad": torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in differentiable),
    }
    return _Call(inputs, scalars)


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The Philox key as an int64 scalar tensor; drawn from torch's generator if not given."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.reshape(())
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor(signed, dtype=torch.int64, device=device)
