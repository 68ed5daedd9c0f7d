"""Attention biases: what each shows, entry by entry, how they are made, and their errors."""

from __future__ import annotations

import pytest
import torch

from tilewise.compat.xformers.ops.fmha import attn_bias as ab

Q, K = (3, 1, 4), (5, 2, 4)
PADDING = 6
STARTS = [1, 8, 11, 16]
TABLE = torch.tensor([[5, 0], [3, 9], [1, 4]], dtype=torch.int32)
PAGE = 4

# The documentation's sentences about query i of m and key j of n, as conditions.
SEES = {
    "all": lambda i, j, m, n: True,
    "causal": lambda i, j, m, n: j <= i,
    "bottom right": lambda i, j, m, n: n - 1 - j >= m - 1 - i,
    "causal local 2": lambda i, j, m, n: i - 2 < j <= i,
    "bottom right local 2": lambda i, j, m, n: m - 1 - i <= n - 1 - j < m - 1 - i + 2,
    "local 2 1": lambda i, j, m, n: i - 2 <= j + (m - n) <= i + 1,
}


def seen(rule: str, m: int, n: int) -> torch.Tensor:
    return torch.tensor([[SEES[rule](i, j, m, n) for j in range(n)] for i in range(m)]).view(m, n)


@pytest.mark.parametrize("sizes", [(4, 4), (3, 6), (6, 3)], ids=str)
@pytest.mark.parametrize(
    "rule, bias",
    [
        ("causal", ab.LowerTriangularMask()),
        ("bottom right", ab.LowerTriangularFromBottomRightMask()),
        (
            "bottom right local 2",
            ab.LowerTriangularFromBottomRightMask().make_local_attention(2),
        ),
        ("local 2 1", ab.LocalAttentionFromBottomRightMask(window_left=2, window_right=1)),
    ],
)
def test_dense_biases(rule, bias, sizes):
    made = bias.materialize((2, 3, *sizes), torch.bfloat16)
    assert made.shape == (2, 3, *sizes) and made.dtype == torch.bfloat16
    want = torch.where(seen(rule, *sizes), 0.0, -torch.inf)
    assert torch.equal(made[1, 2].float(), want)
    assert bias.to("cpu").materialize(sizes).equal(want)


def test_local_window_is_the_documented_example():
    bias = ab.LocalAttentionFromBottomRightMask(window_left=1, window_right=2)
    assert bias.materialize((4, 5)).exp().tolist() == [
        [1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
    ]


def test_causal_with_a_tensor():
    tensor = torch.randn(2, 3, 4, 6)
    bias = ab.LowerTriangularMask().add_bias(tensor)
    assert type(bias) is ab.LowerTriangularMaskWithTensorBias and bias.HOLDS_DENSE_TENSOR
    want = tensor + torch.where(seen("causal", 4, 6), 0.0, -torch.inf)
    assert torch.equal(bias.materialize((2, 3, 4, 6)), want)
    assert torch.equal(bias.to("cpu").bias, tensor)


def windowed(kind, *args):
    return kind.from_seqlens_local(Q, *args)


BLOCKS = ab.BlockDiagonalMask.from_seqlens(Q, K)
PADDED = (PADDING, K)
GAPPY = (STARTS, K)
PAGED = (K, TABLE, PAGE)
GAPPY_PAGED = ([3, 0, 2], K, TABLE, PAGE)
KINDS = {
    "blocks": [
        ("all", BLOCKS),
        ("causal", BLOCKS.make_causal()),
        ("bottom right", BLOCKS.make_causal_from_bottomright()),
        ("causal local 2", BLOCKS.make_local_attention(2)),
        ("bottom right local 2", BLOCKS.make_local_attention_from_bottomright(2)),
    ],
    "padded": [
        ("all", ab.BlockDiagonalPaddedKeysMask.from_seqlens(Q, *PADDED)),
        ("bottom right", ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(Q, *PADDED)),
        ("local 2 1", windowed(ab.BlockDiagonalLocalAttentionPaddedKeysMask, *PADDED, 2, 1)),
        (
            "bottom right local 2",
            windowed(ab.BlockDiagonalCausalLocalAttentionPaddedKeysMask, *PADDED, 2),
        ),
    ],
    "gappy": [
        ("all", ab.BlockDiagonalGappyKeysMask.from_seqlens(Q, *GAPPY)),
        ("bottom right", ab.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(Q, *GAPPY)),
        (
            "local 2 1",
            windowed(ab.BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask, *GAPPY, 2, 1),
        ),
    ],
    "paged": [
        ("all", ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens(Q, *PAGED)),
        (
            "bottom right",
            ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(Q, *PAGED),
        ),
        (
            "bottom right local 2",
            windowed(ab.PagedBlockDiagonalCausalLocalPaddedKeysMask, *PAGED, 2),
        ),
    ],
    "gappy paged": [
        ("all", ab.PagedBlockDiagonalGappyKeysMask.from_seqlens(Q, *GAPPY_PAGED)),
        (
            "bottom right",
            ab.PagedBlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(Q, *GAPPY_PAGED),
        ),
    ],
}


def place(kind: str, n: int, j: int) -> int:
    """Where key j of sequence n stands."""
    if kind == "blocks":
        return sum(K[:n]) + j
    if kind == "padded":
        return PADDING * n + j
    if kind == "gappy":
        return STARTS[n] + j
    j += GAPPY_PAGED[0][n] if kind == "gappy paged" else 0
    return int(TABLE[n, j // PAGE]) * PAGE + j % PAGE


@pytest.mark.parametrize(
    "kind, rule, bias", [(kind, *entry) for kind, entries in KINDS.items() for entry in entries]
)
def test_varlen_biases(kind, rule, bias):
    total = {"blocks": sum(K), "padded": 18, "gappy": 16, "paged": 40, "gappy paged": 40}[kind]
    asked = 3 * 2 * PAGE if "paged" in kind else total
    want = torch.full((sum(Q), total), -torch.inf)
    for n, (m, keys) in enumerate(zip(Q, K, strict=True)):
        for i in range(m):
            for j in range(keys):
                if SEES[rule](i, j, m, keys):
                    want[sum(Q[:n]) + i, place(kind, n, j)] = 0
    assert torch.equal(bias.materialize((sum(Q), asked)), want)
    moved = bias.to("cpu")
    assert type(moved) is type(bias)
    assert torch.equal(moved.materialize((2, sum(Q), asked))[1], want)
    with pytest.raises(ValueError, match=r"^shape: got"):
        bias.materialize((sum(Q), asked + 1))
    assert isinstance(bias, ab.VARLEN_BIASES) and not bias.HOLDS_DENSE_TENSOR


def test_every_class_is_tested():
    entries = [bias for each in KINDS.values() for _, bias in each]
    dense = {"AttentionBias", "VARLEN_BIASES", *(n for n in ab.__all__ if n.startswith("Lo"))}
    assert {type(bias).__name__ for bias in entries} | dense == set(ab.__all__)
    assert len(ab.__all__) == 24


def test_lists_are_packed_and_split_again():
    xs = [torch.randn(2, 3, 2, 8), torch.randn(1, 5, 2, 8), torch.randn(3, 1, 2, 8)]
    bias, packed = ab.BlockDiagonalMask.from_tensor_list(xs)
    assert packed.shape == (1, 14, 2, 8) and bias.q_seqinfo.seqstart_py == [0, 3, 6, 11, 12, 13, 14]
    for made in (bias, bias.make_causal(), bias.to("cpu")):
        back = made.split(packed)
        assert len(back) == 3 and all(torch.equal(a, b) for a, b in zip(back, xs, strict=True))

    longer = [torch.randn(n, m + 2, 8) for n, m in ((2, 3), (1, 5), (3, 1))]
    bias, q, k, v = ab.BlockDiagonalMask.from_tensor_lists_qkv(xs, longer, longer)
    assert torch.equal(q, packed) and torch.equal(k, v)
    assert all(torch.equal(a, b) for a, b in zip(bias.split_queries(q), xs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bias.split_kv(k), longer, strict=True))
    with pytest.raises(ValueError, match="use split_queries or split_kv"):
        bias.split(q)
    with pytest.raises(ValueError, match=r"^tensor: got shape \[1, 13"):
        bias.split_queries(q[:, 1:])
    with pytest.raises(NotImplementedError, match="split"):
        KINDS["padded"][0][1].k_seqinfo.split(k)


def test_make_paged():
    table = torch.tensor([[5, 0], [3, 9], [1, 4]], dtype=torch.int32)
    shape = (sum(Q), 24)
    paged = dict(KINDS["paged"])
    for rule, bias in KINDS["padded"]:
        if rule not in paged:
            continue
        made = bias.make_paged(table, PAGE, type(paged[rule]))
        assert type(made) is type(paged[rule]) and made.k_seqinfo.padding == 8
        assert torch.equal(made.materialize(shape), paged[rule].materialize(shape))
    window = dict(KINDS["padded"])["local 2 1"]
    for kind in (ab.PagedBlockDiagonalPaddedKeysMask, type(paged["bottom right local 2"])):
        with pytest.raises(ValueError, match=r"^paged_type: .* window of 2 keys before and 1"):
            window.make_paged(table, PAGE, kind)

    for rule, want in KINDS["gappy paged"]:
        kind = type(dict(KINDS["gappy"])[rule])
        bias = kind.from_seqlens(Q, [3, 8 + 0, 16 + 2, 24], K)
        made = bias.make_paged(table, PAGE, 8, type(want))
        assert torch.equal(made.materialize(shape), want.materialize(shape))
        with pytest.raises(ValueError, match=r"^notional_padding: got 6"):
            bias.make_paged(table, PAGE, 6, type(want))


def test_unused_entries_of_a_table_mean_nothing():
    table = torch.tensor([[5, -1], [5, 0]], dtype=torch.int32)
    bias = ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens((1, 1), (2, 6), table, PAGE)
    made = bias.materialize((2, 16)) == 0
    assert made.nonzero().tolist() == [[0, 20], [0, 21], *([1, j] for j in (0, 1, 20, 21, 22, 23))]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ab.LocalAttentionFromBottomRightMask(-1, 2), r"^window_left: got -1"),
        (lambda: ab.LocalAttentionFromBottomRightMask(1, 2.5), r"^window_right: got 2.5"),
        (
            lambda: ab.LowerTriangularFromBottomRightMask().make_local_attention(0),
            r"^window_size: got 0",
        ),
        (lambda: ab.LowerTriangularMaskWithTensorBias(3), r"^bias: got 3"),
        (lambda: BLOCKS.make_local_attention(0), r"^window_size: got 0"),
        (lambda: BLOCKS.make_local_attention_from_bottomright(0), r"^window_size: got 0"),
        (
            lambda: ab.BlockDiagonalMask.from_seqlens((9,), (2,)).make_local_attention(3),
            r"^window_size: with 3 the last of the 9 queries of block 0 sees none of its 2",
        ),
        (
            lambda: ab.BlockDiagonalMask.from_seqlens(
                (3, 4), (3, 2)
            ).make_causal_from_bottomright(),
            r"^kv_seqlen: block 1 has 2 keys for 4 queries",
        ),
        (lambda: ab.BlockDiagonalMask.from_seqlens((3,), (1, 2)), r"^kv_seqlen: describes 2"),
        (lambda: ab.BlockDiagonalMask.from_seqlens((3, -1)), r"^seqlens: got -1"),
        (lambda: ab.BlockDiagonalMask.from_seqlens(torch.tensor([3])), r"^seqlens: got a tensor"),
        (lambda: ab.BlockDiagonalMask.from_tensor_list([]), r"^tensors: got an empty list"),
        (
            lambda: ab.BlockDiagonalPaddedKeysMask.from_seqlens((1,), 4, (5,)),
            r"^kv_seqlen: a block has 5 keys in use but room for 4",
        ),
        (
            lambda: ab.BlockDiagonalPaddedKeysMask.from_seqlens((1,), 4, (3,), "x"),
            r"^causal_diagonal: got 'x'",
        ),
        (
            lambda: ab.BlockDiagonalGappyKeysMask.from_seqlens((1,), [0], (3,)),
            r"^kv_seqstarts: got 1 entries; it must have 2",
        ),
        (
            lambda: ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens((1,), (9,), TABLE[:1], PAGE),
            r"^kv_seqlen: a block has 9 keys in use but room for 8",
        ),
        (
            lambda: ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens((1,), (2,), TABLE, PAGE),
            r"^block_tables: shape is \[3, 2\]",
        ),
        (
            lambda: ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens(Q, K, TABLE.float(), PAGE),
            r"^block_tables: dtype is torch.float32",
        ),
    ],
)
def test_refusals_name_the_argument(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
