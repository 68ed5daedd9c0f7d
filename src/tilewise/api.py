"""The public calls. Each checks its arguments, lowers the mask, and hands over to one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from . import ops, recipes
from .checks import (
    check_cache,
    check_cu_seqlens,
    check_lengths,
    check_packed,
    check_pages,
    longest,
    score_options,
)
from .dispatch import BACKENDS, check_name, choose, reasons_against
from .explanation import Explanation
from .frame import Frame
from .masks import Mask
from .problem import Inputs, Problem
from .tiles import FULL, PARTIAL, SKIP

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import Cached, Dense, Options, Packed


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[Dense]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Dense]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[Dense]
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
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
        q: ``[batch, q_heads, q_len, head_dim]``; float64, float32, float16, bfloat16, or
            float8_e4m3fn, which is forward only; any strides.
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
        q_descale: factor on a float8 q, finite float32 ``[kv_heads]`` or ``[batch, kv_heads]``, for
            all query heads of the kv head; default 1 (FlashAttention-3, arXiv:2407.08608, 3.3).
        k_descale: the same for k.
        v_descale: the same for v.
        dropout_p: probability in [0, 1) with which a weight is dropped (Philox, see ``philox``).
        seed: int or int64 scalar tensor; None draws one from torch's default generator.
        return_lse: also return the log of the softmax denominator, sinks included.
        backend: ``"auto"``, or a name, which then runs or raises and never falls back.

    Returns:
        ``out [batch, q_heads, q_len, v_dim]`` in q's memory layout and dtype, bfloat16 for float8;
        with ``return_lse``
        also ``lse [batch, q_heads, q_len]``, natural log, float32 (float64 for float64), -inf where
        no key is visible (the sink's logit where there is one).

    Gradients flow to q, k, v, bias, alibi, relative_bias and sinks, from ``out`` and from ``lse``,
    the same bits every time.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: the backend asked for by name cannot run the call.
    """
    tensors = (q, k, v, bias, alibi, relative_bias, sinks)
    descales = (q_descale, k_descale, v_descale)
    recipe = recipes.find(
        tensors,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        backend=backend,
        descales=descales,
    )
    inputs = recipe.inputs(tensors, mask, seed, descales)
    grad = ops.needs_grad(inputs)
    if ops.is_observed(inputs):
        out, lse = ops.observed_attention(
            inputs, needs_grad=grad, backend=backend, **recipe.scalars
        )
    else:
        out, lse = ops.attention(inputs, recipe.problem(inputs, grad), backend)
    return (out, lse) if return_lse else out


@overload
def standard_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[Options]
) -> Tensor: ...
@overload
def standard_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def standard_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as the textbook writes it: the dense peer of ``attention``, same options.

    Plain PyTorch operations in the inputs' dtype, differentiated by autograd, with the whole score
    matrix in memory: O(N^2). Arguments, result and errors are those of ``attention``.
    """
    tensors = (q, k, v, bias, alibi, relative_bias, sinks)
    descales = (q_descale, k_descale, v_descale)
    recipe = recipes.find(
        tensors, scale=scale, softcap=softcap, dropout_p=dropout_p, descales=descales
    )
    inputs = recipe.inputs(tensors, mask, seed, descales)
    problem = recipe.problem(inputs, ops.needs_grad(inputs))
    from .backends import reference

    out, lse = reference.standard(problem, inputs, with_lse=return_lse)
    return out if lse is None else (out, lse)


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[Packed],
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    *,
    return_lse: Literal[True],
    **options: Unpack[Packed],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    *,
    return_lse: bool,
    **options: Unpack[Packed],
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
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
        q_descale: ``[kv_heads]`` or ``[sequences, kv_heads]``, as k_descale and v_descale.
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
    inputs, scalars = recipes.assemble(
        tuple(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        mask,
        frame,
        options,
        (q_descale, k_descale, v_descale),
        relative_zero=longest_k - 1,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=seed,
    )
    out, lse = _attend(inputs, scalars, backend)
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


@overload
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    return_lse: Literal[False] = ...,
    **options: Unpack[Cached],
) -> Tensor: ...
@overload
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    return_lse: Literal[True],
    **options: Unpack[Cached],
) -> tuple[Tensor, Tensor]: ...
@overload
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    return_lse: bool,
    **options: Unpack[Cached],
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
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
    inputs, scalars = recipes.assemble(
        (q, k_cache, v_cache),
        mask,
        frame,
        options,
        (q_descale, k_descale, v_descale),
        relative_zero=max_len - 1,
        scale=scale,
        softcap=softcap,
        page_table=page_table,
    )
    if ops.needs_grad(inputs):
        raise ValueError(
            "q: an input requires a gradient but decode is forward only; call it under "
            "torch.no_grad(), or use attention with masks.lengths"
        )
    out, lse = _attend(inputs, scalars, backend)
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
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Explanation:
    """Which backend and plan ``attention`` gives this call, and why each other was passed over.

    Takes what ``attention`` takes, computes nothing and draws no random number. The answer comes
    from the function that the call itself asks.
    """
    tensors = (q, k, v, bias, alibi, relative_bias, sinks)
    descales = (q_descale, k_descale, v_descale)
    recipe = recipes.find(
        tensors,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        backend=backend,
        descales=descales,
    )
    inputs = recipe.inputs(tensors, mask, 0 if seed is None else seed, descales)
    problem = recipe.problem(inputs, ops.needs_grad(inputs))
    plan = choose(problem, backend)
    counts = {"skipped": 0, "partial": 0, "full": 0}
    if not problem.is_empty:
        states = inputs.mask.table(plan.block_q, plan.block_kv)
        names = zip(counts, (SKIP, PARTIAL, FULL), strict=True)
        counts = {name: int((states == state).sum()) for name, state in names}
    reasons = reasons_against(problem)
    return Explanation(problem, plan, backend, {name: reasons[name] for name in BACKENDS}, counts)


def _attend(inputs: Inputs, scalars: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    grad = ops.needs_grad(inputs)
    if ops.is_observed(inputs):
        return ops.observed_attention(inputs, needs_grad=grad, backend=backend, **scalars)
    return ops.attention(inputs, Problem.of(inputs, needs_grad=grad, **scalars), backend)
