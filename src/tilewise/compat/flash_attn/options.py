"""flash-attn's arguments in tilewise's words: layouts, masks, score options, refusals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import UnsupportedError, masks
from ...masks import Mask

Window = tuple[int | None, int | None]


def check_layout(name: str, x: object, layout: str) -> Tensor:
    """``x`` if it is a tensor with as many dimensions as ``layout`` names, such as "(b, s, d)"."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    rank = layout.count(",") + 1
    if x.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {layout}, got shape {list(x.shape)}")
    return x


def check_size(name: str, x: Tensor, dim: int, size: int, why: str) -> None:
    """``x`` has ``size`` entries along ``dim``."""
    if x.shape[dim] != size:
        raise ValueError(
            f"{name}: size of dimension {dim} is {x.shape[dim]}; it must be {size}, {why}"
        )


def refuse(function: str, why: str, **arguments: Any) -> None:
    """Raise UnsupportedError for the first argument that is not at its default None."""
    for name, value in arguments.items():
        if value is not None:
            raise UnsupportedError(f"{name}: {function} cannot honour it: {why}")


def check_hint(name: str, value: object, least: int | None = 0) -> None:
    """A scheduling hint: it can change no result here, and only has to be a proper number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: must be at least {least}, got {value}")


def check_pack_gqa(pack_gqa: object) -> None:
    """Also a hint: whether a kernel treats the query heads of one kv head together."""
    if pack_gqa is not None and not isinstance(pack_gqa, bool):
        raise TypeError(f"pack_gqa: must be a bool or None, got {pack_gqa!r}")


def window_sides(causal: bool, window_size: object) -> Window:
    """How many keys to the left and right are visible; None is unbounded, as is the peer's -1."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size: must be (left, right), got {window_size!r}")
    sides = []
    for side in window_size:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"window_size: must hold two ints or None, got {window_size!r}")
        if side is not None and side < -1:
            raise ValueError(f"window_size: -1 or None is unbounded, got {window_size!r}")
        sides.append(None if side == -1 else side)
    # A causal call has no right side whatever window_size says (flash_api.cpp: right = 0).
    return sides[0], 0 if causal else sides[1]


def visible(causal: bool, window_size: object, chunk: int = 0) -> Mask | None:
    """The mask, aligned at the end as all of flash-attn's are; ``chunk`` 0 is no chunks."""
    left, right = window_sides(causal, window_size)
    check_hint("attention_chunk", chunk)
    mask: Mask | None = None
    if left is None and right == 0:
        mask = masks.causal()
    elif left is not None or right is not None:
        mask = masks.window(left, right)
    if chunk:
        mask = masks.chunks(chunk) if mask is None else mask & masks.chunks(chunk)
    return mask


def score_options(
    softmax_scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None = None,
    *,
    heads: int = 0,
    sequences: int = 0,
) -> dict[str, Any]:
    """``scale``, ``softcap`` and ``alibi`` for tilewise, judged under the peer's names."""
    if softmax_scale is not None and not (
        isinstance(softmax_scale, (int, float)) and math.isfinite(softmax_scale)
    ):
        raise ValueError(f"softmax_scale: must be a finite number or None, got {softmax_scale!r}")
    if softcap is not None and not (
        isinstance(softcap, (int, float)) and math.isfinite(softcap) and softcap >= 0
    ):
        raise ValueError(f"softcap: must be 0 (none) or a positive finite number, got {softcap!r}")
    if alibi_slopes is not None:
        if not isinstance(alibi_slopes, Tensor):
            raise TypeError(f"alibi_slopes: expected a torch.Tensor, got {alibi_slopes!r}")
        if tuple(alibi_slopes.shape) not in ((heads,), (sequences, heads)):
            raise ValueError(
                f"alibi_slopes: shape is {list(alibi_slopes.shape)}; it must be (nheads,) = "
                f"[{heads}] or (batch_size, nheads) = [{sequences}, {heads}]"
            )
    return {
        "scale": softmax_scale,
        "softcap": None if softcap == 0 else softcap,
        "alibi": alibi_slopes,
    }


def lengths_of(cu_seqlens: Tensor) -> Tensor:
    """Length of each packed sequence, int64."""
    return (cu_seqlens[1:] - cu_seqlens[:-1]).long()


def check_longest(name: str, longest: object, cu_seqlens: Tensor) -> None:
    """``max_seqlen`` sizes the peer's launch; one below the longest sequence would cut it off."""
    if isinstance(longest, Tensor) and longest.numel() == 1 and not longest.is_floating_point():
        longest = longest if torch.compiler.is_compiling() else int(longest)
    elif isinstance(longest, bool) or not isinstance(longest, int):
        raise TypeError(f"{name}: must be an int, got {longest!r}")
    if torch.compiler.is_compiling() or cu_seqlens.numel() < 2:
        return
    needed = int(lengths_of(cu_seqlens).max())
    if longest < needed:
        raise ValueError(f"{name}: got {longest} but the longest sequence has {needed} tokens")


def cuda_lse(lse: Tensor) -> Tensor:
    """FlashAttention-2 reports +inf for a row that sees no key; tilewise, FA3 and FA4 -inf."""
    return torch.where(torch.isneginf(lse), torch.inf, lse)


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed from torch's default generator, the same draw that tilewise makes itself."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def cumulative(lengths: Tensor) -> Tensor:
    """Where packed sequences of ``lengths (sequences,)`` begin: int32 ``(sequences + 1,)``."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def check_sink(sink: Tensor | None, heads: int) -> Tensor | None:
    """``learnable_sink (nheads,)``, one logit for each query head."""
    if sink is not None:
        check_size(
            "learnable_sink",
            check_layout("learnable_sink", sink, "(nheads)"),
            0,
            heads,
            "one for each of q's heads",
        )
    return sink
