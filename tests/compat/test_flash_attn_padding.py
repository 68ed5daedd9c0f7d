"""flash_attn.bert_padding: what is kept, where it goes, and back."""

from __future__ import annotations

import pytest
import torch

from tilewise.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.int()], ids=["int64", "bool", "int32"])
@pytest.mark.parametrize("inner", [(), (3,), (2, 5)])
def test_unpad_gives_five_values(mask, inner):
    x = torch.randn(4, 4, *inner)
    tokens, indices, cu_seqlens, longest, seqused = unpad_input(x, mask)
    assert torch.equal(tokens, x[MASK.bool()])
    assert indices.tolist() == [0, 1, 8, 9, 10, 11, 13, 15] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 2, 2, 6, 8] and cu_seqlens.dtype == torch.int32
    assert longest == 4 and isinstance(longest, int)
    assert seqused.tolist() == [2, 0, 4, 2] and seqused.dtype == torch.int32


def test_unused_places_are_kept_but_not_counted_as_used():
    unused = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    x = torch.randn(4, 4, 3)
    tokens, indices, cu_seqlens, longest, seqused = unpad_input(x, MASK, unused)
    assert indices.tolist() == [0, 1, 2, 4, 8, 9, 10, 11, 13, 15]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 3, 4, 8, 10] and longest == 4
    assert seqused.tolist() == [2, 0, 4, 2]


def test_pad_undoes_unpad_and_both_are_differentiable():
    x = torch.randn(4, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    tokens, indices, *_ = unpad_input(x, MASK)
    back = pad_input(tokens, indices, 4, 4)
    keep = MASK.bool()[..., None, None]
    assert torch.equal(back, x * keep)
    arriving = torch.randn_like(back)
    back.backward(arriving)
    assert torch.equal(x.grad, arriving * keep)


def test_concatenated_sequences():
    """The example of the peer's documentation: rows of 2 + 3, 3 + 2 and 6 tokens."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2)
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32
    assert longest == 6


def test_index_functions():
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 2])
    assert torch.equal(index_first_axis(x, rows), x[rows])
    spread = index_put_first_axis(x[:3], rows, 6)
    assert torch.equal(spread[rows], x[:3]) and (spread[[1, 3, 5]] == 0).all()
    assert torch.autograd.gradcheck(lambda y: index_first_axis(y, rows), x)
    assert torch.autograd.gradcheck(lambda y: index_put_first_axis(y[:3], rows, 6), x)


def test_nothing_at_all():
    tokens, indices, cu_seqlens, longest, _ = unpad_input(torch.randn(2, 3, 4), MASK[:2, :3] * 0)
    assert tokens.shape == (0, 4) and indices.shape == (0,)
    assert cu_seqlens.tolist() == [0, 0, 0] and longest == 0
    assert torch.equal(pad_input(tokens, indices, 2, 3), torch.zeros(2, 3, 4))


def test_bad_input_is_named():
    x = torch.randn(4, 4, 2)
    with pytest.raises(ValueError, match=r"attention_mask: shape is \[4, 3\]"):
        unpad_input(x, MASK[:, :3])
    with pytest.raises(ValueError, match="attention_mask: expected 2"):
        unpad_input(x, MASK[0])
    with pytest.raises(ValueError, match=r"unused_mask: shape is \[3, 4\]"):
        unpad_input(x, MASK, MASK[:3])
    with pytest.raises(ValueError, match=r"attention_mask_in_length: rows hold \[5, 0, 0, 0\]"):
        unpad_input_for_concatenated_sequences(x, torch.diag(torch.tensor([5, 0, 0, 0])))
    with pytest.raises(ValueError, match="indices: expected 1"):
        index_first_axis(x, MASK)
