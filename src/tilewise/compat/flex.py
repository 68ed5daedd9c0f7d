"""PyTorch's ``flex_attention`` on tilewise: on the CPU too, with a backward, and no compiler.

A ``mask_mod`` becomes a mask of tilewise, asked entry by entry as PyTorch asks it; a score is
modified by the options that tilewise has, under the names in ``score_mods``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

from .. import UnsupportedError, masks
from ..api import attention
from ..masks import Mask
from .score_mods import ScoreMod
from .sdpa_call import arrange

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_made: weakref.WeakKeyDictionary[BlockMask, Mask] = weakref.WeakKeyDictionary()
"""The mask of each BlockMask that is alive, so that layers which share one lower it once."""


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | Mask | MaskMod | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """``torch.nn.attention.flex_attention.flex_attention``, forward and backward.

    Args:
        query: ``[batch, q_heads, q_len, head_dim]``.
        key: ``[batch or 1, kv_heads, kv_len, head_dim]``.
        value: the same with ``v_dim``.
        score_mod: from ``tilewise.compat.sdpa.score_mods``. An arbitrary function is refused.
        block_mask: PyTorch's ``BlockMask``, a ``mask_mod(b, h, q_idx, kv_idx)`` on its own, or a
            mask from ``tilewise.masks``.
        scale: factor on ``q . k``; default ``1 / sqrt(head_dim)``.
        enable_gqa: consecutive query heads share a kv head.
        return_lse: also return the log of the softmax denominator, natural, with gradient.
        kernel_options: must be None or empty: tilewise plans its own tiles.
        return_aux: PyTorch's newer way to ask, ``AuxRequest(lse=True)``; excludes ``return_lse``.
            ``max_scores`` is refused.

    Returns:
        ``out [batch, q_heads, q_len, v_dim]``; with ``return_lse`` also ``lse [batch, q_heads,
        q_len]``; with ``return_aux`` also an ``AuxOutput`` that holds it if it was asked for. A
        query that sees no key gives 0 and -inf.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: ``score_mod`` or ``kernel_options`` ask for what only a compiler can do,
            or ``return_aux`` for ``max_scores``.
    """
    if kernel_options:
        raise UnsupportedError(
            f"kernel_options: got {sorted(kernel_options)}; tilewise plans its own tiles, pass None"
        )
    return_lse = _asks_for_lse(return_lse, return_aux)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, Tensor) and x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [batch, heads, length, dim], got {x.dim()}"
            )
    mod = _score_mod(score_mod)
    call = arrange(query, key, value, None, 0.0, scale, enable_gqa)
    batch, heads, q_len, _ = call.shape
    mask = _mask(block_mask, (batch, heads, q_len, key.shape[-2]))
    if mod.mask is not None:
        mask = mod.mask if mask is None else mask & mod.mask
    result = attention(
        call.query,
        call.key,
        call.value,
        mask=mask,
        scale=scale,
        return_lse=return_lse,
        **mod.options,
    )
    if return_aux is None:
        return result
    out, lse = result if isinstance(result, tuple) else (result, None)
    return out, AuxOutput(lse=lse)


def as_mask(block_mask: BlockMask | MaskMod) -> Mask:
    """A mask of tilewise that shows what ``block_mask``, or a ``mask_mod`` on its own, shows.

    The mask of a BlockMask is made once and lives as long as it does. It remembers its tiles, so
    make a new BlockMask when what its ``mask_mod`` reads has changed, as PyTorch needs it, too.
    """
    if not isinstance(block_mask, BlockMask):
        return masks.from_predicate(_entrywise(block_mask))
    if block_mask not in _made:
        _made[block_mask] = masks.from_predicate(_of_blocks(block_mask))
    return _made[block_mask]


def _asks_for_lse(return_lse: bool, return_aux: AuxRequest | None) -> bool:
    """Whether ``lse`` is wanted, by either name; what else could be asked for is refused."""
    if return_aux is None:
        return return_lse
    if not isinstance(return_aux, AuxRequest):
        raise TypeError(
            f"return_aux: expected an AuxRequest or None, got {type(return_aux).__name__}"
        )
    if return_lse:
        raise ValueError("return_aux: given together with return_lse=True; set one of them")
    if return_aux.max_scores:
        raise UnsupportedError(
            "return_aux: got max_scores=True; tilewise keeps no row maximum, only lse"
        )
    return return_aux.lse


def _score_mod(score_mod: object) -> ScoreMod:
    if score_mod is None:
        return ScoreMod()
    if isinstance(score_mod, ScoreMod):
        return score_mod
    raise UnsupportedError(
        f"score_mod: got {getattr(score_mod, '__name__', type(score_mod).__name__)}; tilewise "
        "compiles no functions. It takes what tilewise.compat.sdpa.score_mods makes (softcap, "
        "alibi, relative_bias, bias, causal, combine); what hides entries can be a mask_mod"
    )


def _mask(block_mask: object, sizes: tuple[int, int, int, int]) -> Mask | None:
    """``block_mask`` as a mask for a call of the given sizes."""
    if block_mask is None or isinstance(block_mask, Mask):
        return block_mask
    if isinstance(block_mask, BlockMask):
        made_for = (*block_mask.shape[:2], *block_mask.seq_lengths)
        fits = all(n == size for n, size in zip(made_for[2:], sizes[2:], strict=True))
        if not fits or any(n not in (1, m) for n, m in zip(made_for[:2], sizes[:2], strict=True)):
            raise ValueError(
                f"block_mask: was made for [batch, heads, q_len, kv_len] = {list(made_for)} but "
                f"the call is {list(sizes)}; make one for these sizes"
            )
    elif not callable(block_mask):
        raise TypeError(
            "block_mask: expected a BlockMask, a mask_mod or a mask from tilewise.masks, got "
            f"{type(block_mask).__name__}"
        )
    return as_mask(block_mask)


def _entrywise(mask_mod: MaskMod) -> MaskMod:
    """``mask_mod`` for tensors of indices: asked for each entry alone, as PyTorch asks it."""
    each = mask_mod
    for axis in (3, 2, 1, 0):
        each = torch.vmap(each, in_dims=tuple(0 if n == axis else None for n in range(4)))

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return each(b.flatten(), h.flatten(), q.flatten(), kv.flatten())

    return visible


def _of_blocks(block_mask: BlockMask) -> MaskMod:
    """Full blocks are visible, partial ones where ``mask_mod`` says so, the others are not.

    The function must not hold ``block_mask`` itself, whose life the mask's depends on.
    """
    mask_mod = _entrywise(block_mask.mask_mod)
    rows, columns = block_mask.BLOCK_SIZE
    key_blocks = -(-block_mask.seq_lengths[1] // columns)
    partial = _table(block_mask.kv_num_blocks, block_mask.kv_indices, key_blocks)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        assert block_mask.full_kv_indices is not None
        full = _table(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, key_blocks)
    batch, heads = partial.shape[:2]

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        b = b if batch > 1 else b[:1] * 0
        h = h if heads > 1 else h[:, :1] * 0
        block = (b, h, q // rows, kv // columns)
        return (mask_mod(b, h, q, kv) & partial[block]) | full[block]

    return visible


def _table(count: Tensor, indices: Tensor, key_blocks: int) -> Tensor:
    """bool ``[batch, heads, q blocks, kv blocks]``: the first ``count`` of ``indices``."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < count.unsqueeze(-1)
    column = torch.where(listed, indices, key_blocks).to(torch.int64)
    table = torch.zeros(*count.shape, key_blocks + 1, dtype=torch.bool, device=indices.device)
    return table.scatter_(-1, column, True)[..., :-1]
