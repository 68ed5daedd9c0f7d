"""Calls of memory_efficient_attention that are refused, and what the errors say."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise.compat.xformers import ops as xops
from tilewise.compat.xformers.ops import fmha
from tilewise.compat.xformers.ops.fmha import attn_bias as ab

X = torch.randn(1, 12, 2, 8)
BLOCKS = ab.BlockDiagonalMask.from_seqlens((5, 1, 6), (7, 3, 10))
TABLE = torch.tensor([[7, 2, 0], [4, 9, 1], [3, 5, 8]], dtype=torch.int32)
PAGED = ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens((5, 1, 6), (7, 3, 10), TABLE, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: f(X[0, 0], X, X), r"^query: shape is \[2, 8\]"),
        (lambda f: f(X, X[0], X), r"^key: got shape \[12, 2, 8\]"),
        (lambda f: f(X, X, X.double()), r"^value: got .*float64"),
        (lambda f: f(X, X, X[:, 1:]), r"^value: shape"),
        (lambda f: f(X, X[..., 1:], X[..., 1:]), r"^key: size of dimension 3 is 7"),
        (lambda f: f(X, X.repeat(1, 1, 2, 1), X.repeat(1, 1, 2, 1)), r"^key: has 4 heads"),
        (lambda f: f(X.long(), X, X), r"^query: dtype"),
        (lambda f: f([1], X, X), r"^query: expected a torch.Tensor"),
        (lambda f: f(X, X, X, p=1.0), r"^p: got 1.0"),
        (lambda f: f(X, X, X, p="no"), r"^p: got 'no'"),
        (lambda f: f(X, X, X, scale="x"), r"^scale: "),
        (lambda f: f(X, X, X, output_dtype=torch.int8), r"^output_dtype: got"),
        (lambda f: f(X, X, X, "causal"), r"^attn_bias: got str"),
        (lambda f: f(X, X, X, ab.AttentionBias()), r"^attn_bias: got AttentionBias"),
        (lambda f: f(X, X, X, torch.ones(12, 12).bool()), r"^attn_bias: dtype is torch.bool"),
        (lambda f: f(X, X, X, torch.ones(2, 12, 12)), r"^attn_bias: shape is \[2, 12, 12\]"),
        (lambda f: f(X, X, X, BLOCKS), r"^key: has 12 tokens but BlockDiagonalMask is made for 20"),
        (lambda f: f(X[:, 1:], X, X, BLOCKS), r"^query: has 11 tokens but .* made for 12"),
        (lambda f: f(X.repeat(2, 1, 1, 1), X.repeat(2, 1, 1, 1), X.repeat(2, 1, 1, 1), BLOCKS),
         r"^query: batch is 2; with BlockDiagonalMask it must be 1"),
        (lambda f: f(X, X[:, 1:], X[:, 1:], PAGED), r"^key: .* whole number of pages"),
        (lambda f: f(X, X, X, PAGED), r"^block_tables: entry 7 is .* 3 pages"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(xops.memory_efficient_attention)


def test_refusals_of_the_parts():
    for function in (
        xops.memory_efficient_attention_forward_requires_grad,
        fmha.memory_efficient_attention_partial,
    ):
        with pytest.raises(tilewise.UnsupportedError, match=r"^p: got 0.1"):
            function(X, X, X, p=0.1)
    out, lse = xops.memory_efficient_attention_forward_requires_grad(X, X, X)
    backward = xops.memory_efficient_attention_backward
    with pytest.raises(tilewise.UnsupportedError, match=r"^p: got 0.1"):
        backward(out, out, lse, X, X, X, p=0.1)
    with pytest.raises(ValueError, match=r"^lse: got \[1, 12, 2\]"):
        backward(out, out, lse.mT, X, X, X)
    with pytest.raises(ValueError, match=r"^grad: got"):
        backward(out[0], out, lse, X, X, X)
    with pytest.raises(ValueError, match=r"^lse_split: has 1 parts but attn_split 2"):
        fmha.merge_attentions([out, out], [lse])
    with pytest.raises(ValueError, match=r"^lse_split: part 0 has shape \[1, 12, 2\]"):
        fmha.merge_attentions([out], [lse.mT])


def test_keys_out_of_range():
    """Lengths and tables may change in place after a mask was made, so calls look at them."""
    for kind, made in (
        (ab.BlockDiagonalGappyKeysMask, ([0, 5, 12], (3, 4))),
        (ab.BlockDiagonalPaddedKeysMask, (6, (3, 4))),
    ):
        for queries in ((5, 7), (6, 6)):
            bias = kind.from_seqlens(queries, *made)
            xops.memory_efficient_attention(X, X, X, bias)
            sequences = (0, 1) if kind is ab.BlockDiagonalPaddedKeysMask else (1,)
            for n in sequences:  # sequence 0 would reach into the room of sequence 1
                before = bias.k_seqinfo.seqlen[n].clone()
                bias.k_seqinfo.seqlen[n] = 9
                with pytest.raises(ValueError, match=r"^attn_bias: keys in use run from"):
                    xops.memory_efficient_attention(X, X, X, bias)
                bias.k_seqinfo.seqlen[n] = before
    for queries in ((5, 7), (6, 6)):
        table = torch.tensor([[2, -1], [0, 1]], dtype=torch.int32)
        bias = ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens(queries, (3, 6), table, 4)
        xops.memory_efficient_attention(X, X, X, bias)
        table[1, 1] = 3
        with pytest.raises(ValueError, match=r"^block_tables: entry 3 is in use but there are 3"):
            xops.memory_efficient_attention(X, X, X, bias)
        table[1, 1] = 1
        bias.k_seqinfo.seqlen[0] = 9
        with pytest.raises(ValueError, match=r"^attn_bias: keys in use run from"):
            xops.memory_efficient_attention(X, X, X, bias)
