"""``flash_attn_with_kvcache``: append to a cache in place, turn by rotary angles, attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import decode, masks
from ...masks import Mask
from .layers.rotary import look_up, rotate
from .options import (
    check_hint,
    check_layout,
    cuda_lse,
    score_options,
    visible,
    window_sides,
)
from .varlen import check_table

CACHE_LAYOUT = "(batch_size_cache, seqlen_cache, nheads_k, headdim)"
PAGES_LAYOUT = "(num_blocks, page_block_size, nheads_k, headdim)"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn.flash_attn_with_kvcache``: one step of generation. Forward only.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``, the last positions of each sequence.
        k_cache: ``(batch_size_cache, seqlen_cache, nheads_k, headdim)``; with a block table pages
            ``(num_blocks, page_block_size, nheads_k, headdim)`` of any size. Never copied.
        v_cache: the same with ``headdim_v``.
        k: ``(batch, seqlen_new, nheads_k, headdim)``: written into the cache, in place, behind the
            ``cache_seqlens`` keys that are there. None to append nothing.
        v: ``(batch, seqlen_new, nheads_k, headdim_v)``.
        rotary_cos: ``(seqlen_rotary, rotary_dim / 2)``: turns k by its position in the cache
            before it is written, and q: by ``cache_seqlens + i`` if the call is causal or has a
            window, by ``cache_seqlens`` alone if not. Needs k and v, as in the peer.
        rotary_sin: the same.
        cache_seqlens: how many keys are in the cache before the call, an int or int ``(batch,)``;
            None: it is full (then nothing can be appended).
        cache_batch_idx: int ``(batch,)``: which row of the cache each sequence uses.
        cache_leftpad: int ``(batch,)``: where in its row each sequence begins; keys before it are
            not seen. Positions and ``cache_seqlens`` count from the start of the row.
        block_table: int32 ``(batch, max_blocks)``; excludes ``cache_batch_idx``.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in ``flash_attn_func``, with
            ``seqlen_k = cache_seqlens + seqlen_new``.
        rotary_interleaved: pairs of neighbouring channels; otherwise halves (GPT-NeoX).
        num_splits: a scheduling hint of the peer; no result depends on it.
        return_softmax_lse: also return ``softmax_lse``.

    Returns:
        ``out (batch, seqlen_q, nheads, headdim_v)``; with ``return_softmax_lse`` also
        ``softmax_lse (batch, nheads, seqlen_q)``, +inf for a row that sees no key.

    Raises:
        ValueError, TypeError: an argument does not fit, or a gradient is wanted; the cache is then
            as it was.
    """
    check_hint("num_splits", num_splits)
    cache = Cache.of(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        "block_table",
    )
    mask = visible(causal, window_size)
    out, lse = step(
        cache,
        q,
        k,
        v,
        (rotary_cos, rotary_sin, rotary_interleaved),
        local=window_sides(causal, window_size) != (None, None),
        mask=mask,
        options=score_options(
            softmax_scale, softcap, alibi_slopes, heads=q.shape[2], sequences=q.shape[0]
        ),
    )
    return (out, cuda_lse(lse)) if return_softmax_lse else out


@dataclass(frozen=True)
class Cache:
    """A cache as pages ``(pages, page_size, heads, dim)`` with a table ``(batch, blocks)``.

    A cache without pages is one whose pages are its rows, so that ``cache_batch_idx`` is a table of
    one column and nothing is copied.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    leftpad: Tensor | None
    room: int
    table_name: str

    @staticmethod
    def of(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: int | Tensor | None,
        cache_batch_idx: Tensor | None,
        cache_leftpad: Tensor | None,
        block_table: Tensor | None,
        table_name: str,
    ) -> Cache:
        """Check the arguments that describe the cache."""
        batch = check_layout("q", q, "(batch, seqlen, nheads, headdim)").shape[0]
        layout = CACHE_LAYOUT if block_table is None else PAGES_LAYOUT
        k_cache = check_layout("k_cache", k_cache, layout)
        v_cache = check_layout("v_cache", v_cache, layout)
        if v_cache.shape[:3] != k_cache.shape[:3]:
            raise ValueError(
                f"v_cache: {layout} begins with {list(v_cache.shape[:3])} but k_cache's with "
                f"{list(k_cache.shape[:3])}; they must be equal"
            )
        _check_query(q, k_cache, v_cache)
        pages, size = k_cache.shape[:2]
        if block_table is None:
            table = _rows(cache_batch_idx, batch, pages, q.device)
            room = size
        else:
            if cache_batch_idx is not None:
                raise ValueError(
                    f"cache_batch_idx: a paged cache has none; choose the rows of {table_name}"
                )
            table = check_layout(table_name, block_table, "(batch, max_blocks)")
            room = table.shape[1] * size
        full = room if cache_seqlens is None else cache_seqlens
        lengths = _per_sequence("cache_seqlens", full, batch, q.device)
        if cache_leftpad is not None:
            cache_leftpad = _per_sequence("cache_leftpad", cache_leftpad, batch, q.device)
        if not torch.compiler.is_compiling() and bool(((lengths < 0) | (lengths > room)).any()):
            raise ValueError(
                f"cache_seqlens: got {lengths.tolist()}; each must be from 0 to the cache's {room}"
            )
        return Cache(k_cache, v_cache, table, lengths, cache_leftpad, room, table_name)

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write k and v ``(batch, new, heads, dim)`` at ``positions (batch, new)``, in place."""
        size = self.k.shape[1]
        page = self.table.gather(1, positions // size).long()
        for cache, new in ((self.k, k), (self.v, v)):
            cache.detach()[page, positions % size] = new.detach()


def step(
    cache: Cache,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary: tuple[Tensor | None, Tensor | None, bool],
    *,
    local: bool,
    mask: Mask | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Turn, append, attend; ``local``: whether each query has a position of its own."""
    _check_no_gradient(q=q, k_cache=cache.k, v_cache=cache.v, k=k, v=v)
    new = _check_new(cache, k, v)
    # Everything that can be wrong is found before the cache is written.
    after = cache.lengths + new
    if not torch.compiler.is_compiling() and bool((after > cache.room).any()):
        raise ValueError(
            f"k: {new} new keys do not fit behind {cache.lengths.tolist()} in a cache of "
            f"{cache.room} (cache_seqlens=None says that it is full)"
        )
    check_table(cache.table_name, cache.table, after, *cache.k.shape[:2])
    cos, sin, interleaved = rotary
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos, rotary_sin: they come together or not at all")
    first = cache.lengths.unsqueeze(1)
    where = first + torch.arange(new, device=q.device)
    if cos is not None and sin is not None:
        if k is None:
            raise ValueError("rotary_cos: needs k and v, which it turns before they are written")
        q_position = first + torch.arange(q.shape[1], device=q.device) * int(local)
        tables = (look_up(cos, sin, at, q.shape[3], "rotary_") for at in (q_position, where))
        q, k = (rotate(x, *table, interleaved) for x, table in zip((q, k), tables, strict=True))
    if k is not None and v is not None:
        cache.append(k, v, where)
    if cache.leftpad is not None:
        begun = ~masks.prefix(cache.leftpad)
        mask = begun if mask is None else mask & begun
    table = cache.table.to(torch.int32)
    out, lse = decode(
        q.transpose(1, 2),
        cache.k,
        cache.v,
        lengths=after.to(torch.int32),
        page_table=table,
        mask=mask,
        return_lse=True,
        **options,
    )
    return out.transpose(1, 2), lse


def _check_query(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """What ``decode`` would refuse only after the cache was written."""
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype != q.dtype or x.dtype not in DTYPES:
            raise TypeError(
                f"{name}: dtype is {x.dtype} and q's {q.dtype}; both must be the same one of "
                f"float64, float32, float16 and bfloat16"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: device is {x.device} but q's is {q.device}")
    if q.shape[3] != k_cache.shape[3] or k_cache.shape[2] == 0 or q.shape[2] % k_cache.shape[2]:
        raise ValueError(
            f"q: nheads and headdim are {list(q.shape[2:])}, which do not fit k_cache's "
            f"{list(k_cache.shape[2:])}"
        )


def _check_new(cache: Cache, k: Tensor | None, v: Tensor | None) -> int:
    """How many keys there are to append; k and v must fit the cache."""
    if (k is None) != (v is None):
        raise ValueError("k, v: they come together or not at all")
    if k is None or v is None:
        return 0
    for name, new, old in (("k", k, cache.k), ("v", v, cache.v)):
        check_layout(name, new, "(batch, seqlen_new, nheads_k, headdim)")
        want = [len(cache.lengths), k.shape[1], *old.shape[2:]]
        if list(new.shape) != want:
            raise ValueError(f"{name}: shape is {list(new.shape)}; the cache needs {want}")
        if new.dtype != old.dtype:
            raise TypeError(f"{name}: dtype is {new.dtype} but {name}_cache's is {old.dtype}")
    return k.shape[1]


def _check_no_gradient(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if torch.is_grad_enabled() and x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient but a cache is forward only; call it under "
                f"torch.no_grad()"
            )


def _rows(index: Tensor | None, batch: int, rows: int, device: torch.device) -> Tensor:
    """``cache_batch_idx`` as a table of one column; sequence b uses row b if it is None."""
    if index is None:
        if batch > rows:
            raise ValueError(f"k_cache: has {rows} rows for a batch of {batch}")
        return torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1)
    index = _per_sequence("cache_batch_idx", index, batch, device)
    if not torch.compiler.is_compiling() and bool(((index < 0) | (index >= rows)).any()):
        raise ValueError(f"cache_batch_idx: got {index.tolist()} but the cache has {rows} rows")
    return index.to(torch.int32).unsqueeze(1)


def _per_sequence(name: str, value: object, batch: int, device: torch.device) -> Tensor:
    """An int, or int tensor ``(batch,)``, as int64 ``(batch,)``."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"{name}: dtype is {value.dtype}; it must be an integer dtype")
        if tuple(value.shape) != (batch,):
            raise ValueError(f"{name}: shape is {list(value.shape)}; it must be [{batch}]")
        if value.device != device:
            raise ValueError(f"{name}: device is {value.device} but q's is {device}")
        return value.long()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be an int or an int tensor, got {value!r}")
    return torch.full((batch,), value, dtype=torch.int64, device=device)
