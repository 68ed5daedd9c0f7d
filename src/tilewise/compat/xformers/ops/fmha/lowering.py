"""From an attention bias to tilewise's calls: which one, with which mask, over which sequences.

Tensors here are ``[B, M, heads, K]`` and results ``out [B, M, heads, K]``, ``lse [B, heads, M]``.
No bias becomes a matrix of queries by keys on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..... import attention, attention_varlen, decode, masks
from .block_bias import BlockDiagonalMask, VarlenBias
from .key_bias import BlockDiagonalPaddedKeysMask
from .paged_bias import PagedBias

Result = tuple[Tensor, Tensor]


def attend_batch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Result:
    """A padded batch: ``tilewise.attention`` of transposed views."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention(*heads_first, return_lse=True, **options)
    return out.transpose(1, 2), lse


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, bias: VarlenBias, scale: float | None, p: float
) -> Result:
    """Packed sequences, wherever their keys are.

    Where all sequences have as many queries, nothing needs a gradient and nothing is dropped, keys
    in padded blocks and in pages are a cache that ``decode`` reads in place. Otherwise keys in
    place serve ``attention_varlen``, and keys in pages are gathered first, an O(keys) copy.
    """
    check_packed(q, k, bias)
    edges = bias.q_seqinfo.seqstart.to(q.device)
    one_length = _one_length(edges)
    forward_only = not (p or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))))
    if isinstance(bias, PagedBias):
        start, stop = bias.logical_spans(q.device)
        pages = check_pages(bias, k, start, stop)
        if forward_only and one_length:
            return _decode(q, k, v, bias, one_length, scale, pages)
        where = _in_pages(pages, bias.page_size, start, stop)
        return _attend_gathered(q, k, v, bias, where, stop - start, scale, p)
    if isinstance(bias, BlockDiagonalMask):
        cu_k = bias.k_seqinfo.seqstart.to(q.device)
        return _attend_packed(q, k, v, bias, edges, cu_k, scale, p)
    start, stop = bias.k_seqinfo.spans(q.device)
    check_spans(start, stop, k.shape[1])
    if isinstance(bias, BlockDiagonalPaddedKeysMask):
        check_spans(torch.zeros_like(start), stop - start, bias.k_seqinfo.padding)
        if forward_only and one_length:
            return _decode(q, k, v, bias, one_length, scale)
    if bool((stop[:-1] > start[1:]).any()):  # sequences share keys, or stand in another order
        where = _positions(start, stop)[1]
        return _attend_gathered(q, k, v, bias, where, stop - start, scale, p)
    cu_q, cu_k = with_gaps(edges, start, stop, k.shape[1])
    return _attend_packed(q, k, v, bias, cu_q, cu_k, scale, p)


def with_gaps(edges: Tensor, start: Tensor, stop: Tensor, keys: int) -> Result:
    """``cu_seqlens`` of queries and keys in which what lies between the sequences' keys, before the
    first and after the last is a sequence of its own, without queries.

    So keys stay where they are, and each sequence has just its own, from which positions count.
    """
    spans = torch.stack((start, stop), dim=1).flatten()
    ends = spans.new_tensor([0, keys])
    return edges.long().repeat_interleave(2), torch.cat((ends[:1], spans, ends[1:]))


def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: VarlenBias,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float | None,
    p: float,
) -> Result:
    out, lse = attention_varlen(
        q[0],
        k[0],
        v[0],
        cu_q,
        cu_k,
        mask=bias.band().mask(),
        scale=scale,
        dropout_p=p,
        return_lse=True,
    )
    return out.unsqueeze(0), lse.unsqueeze(0)


def _attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: VarlenBias,
    where: Tensor,
    lengths: Tensor,
    scale: float | None,
    p: float,
) -> Result:
    """Keys ``where``, copied to stand end to end."""
    k, v = k.index_select(1, where), v.index_select(1, where)
    cu_q = bias.q_seqinfo.seqstart.to(q.device).long()
    cu_k = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return _attend_packed(q, k, v, bias, cu_q, cu_k, scale, p)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: VarlenBias,
    queries: int,
    scale: float | None,
    pages: Tensor | None = None,
) -> Result:
    """``queries`` new ones per sequence over a cache, in pages or in blocks of equal room."""
    mask = bias.band().mask()
    if isinstance(bias, PagedBias):
        start, stop = bias.logical_spans(q.device)
        if bool((start > 0).any()):
            used = ~masks.prefix(start)
            mask = used if mask is None else mask & used
        k, v = (x[0].unflatten(0, (-1, bias.page_size)) for x in (k, v))
    else:
        assert isinstance(bias, BlockDiagonalPaddedKeysMask)
        stop = bias.k_seqinfo.seqlen.to(q.device, torch.int64)
        room = (len(stop), bias.k_seqinfo.padding)
        k, v = (x[0].unflatten(0, room).transpose(1, 2) for x in (k, v))
    rows = q[0].unflatten(0, (-1, queries)).transpose(1, 2)
    out, lse = decode(
        rows, k, v, lengths=stop, page_table=pages, mask=mask, scale=scale, return_lse=True
    )
    return out.transpose(1, 2).flatten(0, 1).unsqueeze(0), lse.transpose(0, 1).flatten(1)[None]


def _one_length(edges: Tensor) -> int:
    """The number of queries of each sequence, if all have as many and at least one; else 0."""
    lengths = (edges[1:] - edges[:-1]).tolist()
    return lengths[0] if len(set(lengths)) == 1 else 0


def _positions(start: Tensor, stop: Tensor) -> Result:
    """For all keys of all sequences, end to end: whose they are, and where."""
    lengths = stop - start
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=start.device), lengths)
    first = start - (lengths.cumsum(0) - lengths)
    return sequence, torch.arange(len(sequence), device=start.device) + first[sequence]


def _in_pages(pages: Tensor, size: int, start: Tensor, stop: Tensor) -> Tensor:
    """Where in ``[pages * size]`` the keys of all sequences stand."""
    sequence, position = _positions(start, stop)
    return pages[sequence, position // size].long() * size + position % size


def check_packed(q: Tensor, k: Tensor, bias: VarlenBias) -> None:
    """One row of the batch that holds just the tokens that the mask was made for."""
    name = type(bias).__name__
    if q.shape[0] != 1:
        raise ValueError(f"query: batch is {q.shape[0]}; with {name} it must be 1")
    total = int(bias.q_seqinfo.seqstart[-1])
    if q.shape[1] != total:
        raise ValueError(f"query: has {q.shape[1]} tokens but {name} is made for {total}")
    if isinstance(bias, PagedBias):
        if k.shape[1] % bias.page_size:
            raise ValueError(
                f"key: has {k.shape[1]} tokens; with {name} it must be a whole number of pages of "
                f"{bias.page_size}"
            )
        return
    total = int(bias.k_seqinfo.seqstart[-1])
    if k.shape[1] != total:
        raise ValueError(f"key: has {k.shape[1]} tokens but {name} is made for {total}")


def check_spans(start: Tensor, stop: Tensor, keys: int) -> None:
    """Every sequence's keys lie within the ``keys`` there are."""
    if bool(((start < 0) | (stop < start) | (stop > keys)).any()):
        raise ValueError(
            f"attn_bias: keys in use run from {start.tolist()} to {stop.tolist()}; they must lie "
            f"within the {keys} keys there are"
        )


def check_pages(bias: PagedBias, k: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """The table as int32 on the call's device; entries in use must be pages that exist."""
    check_spans(start, stop, bias.room)
    pages = k.shape[1] // bias.page_size
    table = bias.block_tables.to(k.device, torch.int32)
    first = torch.arange(table.shape[1], device=k.device) * bias.page_size
    used = (first < stop.unsqueeze(1)) & (first + bias.page_size > start.unsqueeze(1))
    wrong = used & ((table < 0) | (table >= pages))
    if bool(wrong.any()):
        raise ValueError(
            f"block_tables: entry {int(table[wrong][0])} is in use but there are {pages} pages"
        )
    # The pages before the first key in use are hidden by the mask; they need only exist.
    return torch.where(used, table, 0)
