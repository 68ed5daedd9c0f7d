"""``flash_attn.bert_padding``: from padded batches to packed tokens and back, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from .options import check_layout, cumulative

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices (n,)`` of ``input (m, ...)``: ``(n, ...)``."""
    return input.index_select(0, check_layout("indices", indices, "(n)"))


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """``(first_axis_dim, ...)``, zero but for rows ``indices (n,)``, which are ``values (n, ...)``.

    ``indices`` must be distinct, as those of ``unpad_input`` are.
    """
    check_layout("indices", indices, "(n)")
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drop the padding.

    Args:
        hidden_states: ``(batch, seqlen, ...)``.
        attention_mask: bool or int ``(batch, seqlen)``: nonzero for a token, 0 for padding.
        unused_mask: the same for places that are kept although nothing uses them.

    Returns:
        The tokens ``(total, ...)``; their int64 ``indices (total,)`` in the flattened batch; int32
        ``cu_seqlens (batch + 1,)``; the longest length as an int; and int32 ``seqused (batch,)``,
        the tokens of each sequence without the unused. Five values, as since flash-attn 2.7.
    """
    used = _check_mask("attention_mask", attention_mask, hidden_states).bool()
    kept = used
    if unused_mask is not None:
        kept = used | _check_mask("unused_mask", unused_mask, hidden_states).bool()
    lengths = kept.sum(dim=1, dtype=torch.int32)
    tokens, indices = _take(hidden_states, kept)
    seqused = used.sum(dim=1, dtype=torch.int32)
    return tokens, indices, cumulative(lengths), _longest(lengths), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Drop the padding of rows that hold several sequences one after another.

    Args:
        hidden_states: ``(batch, seqlen, ...)``.
        attention_mask_in_length: int ``(batch, seqlen)``: the nonzero entries of a row are the
            lengths of its sequences, in order; they fill the row from the left.

    Returns:
        The tokens ``(total, ...)``; their int64 ``indices (total,)``; int32 ``cu_seqlens
        (sequences + 1,)``; and the longest length.

    Raises:
        ValueError: a row's lengths add up to more than ``seqlen``.
    """
    lengths = _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    filled = lengths.sum(dim=1)
    seqlen = lengths.shape[1]
    if bool((filled > seqlen).any()) or bool((lengths < 0).any()):
        raise ValueError(
            f"attention_mask_in_length: rows hold {filled.tolist()} tokens, of {seqlen} each"
        )
    kept = torch.arange(seqlen, device=lengths.device) < filled.unsqueeze(1)
    tokens, indices = _take(hidden_states, kept)
    sequences = lengths[lengths > 0].to(torch.int32)
    return tokens, indices, cumulative(sequences), _longest(sequences)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The tokens ``(total, ...)`` back at ``indices`` of a batch: ``(batch, seqlen, ...)``, zero
    where there is none."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> Tensor:
    mask = check_layout(name, mask, "(batch, seqlen)")
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name}: shape is {list(mask.shape)} but hidden_states begins with "
            f"{list(hidden_states.shape[:2])}"
        )
    return mask


def _take(hidden_states: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    indices = kept.flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0
