"""Masks of transformers as masks of tilewise: the same entries, as runs of keys."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils as theirs

import tilewise
from tilewise.compat.transformers_masks import LazyMask, make_mask
from tilewise.frame import Frame
from tilewise.lowering import lower
from tilewise.tiles import Bitmap

BATCH = 3


def left_padding(lengths: list[int], total: int) -> Tensor:
    return torch.stack([torch.arange(total) >= total - n for n in lengths])


def right_padding(lengths: list[int], total: int) -> Tensor:
    return torch.stack([torch.arange(total) < n for n in lengths])


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0, 1, 2]] * 2)[
    :BATCH
]
PACKED = theirs.find_packed_sequence_indices(POSITIONS)
# Negative ids, whichever, belong to no block.
BLOCKS = torch.tensor([[-1, 0, 0, 0, -12, -1, 1, 1, 1, 1, -1, 2, 2, -1, -1, -1]] * BATCH)
FIRST = torch.tensor([0, 3, 1])

FUNCTIONS = {
    "causal": theirs.causal_mask_function,
    "bidirectional": theirs.bidirectional_mask_function,
    "window": theirs.sliding_window_causal_mask_function(3),
    "both ways": theirs.sliding_window_bidirectional_mask_function(2),
    "chunks": theirs.chunked_causal_mask_function(4, FIRST),
    "blocks": theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(BLOCKS)),
}
with_remap = pytest.mark.skipif(
    not hasattr(theirs, "packed_sequence_compatibility_function"),
    reason="this transformers does not count positions within packed sequences",
)
# q_len, kv_len, q_offset, kv_offset: alone, a dynamic cache, static ones (filled in part, empty,
# becoming full), a sliding one, a decode step of each
PLACES = [
    (10, 10, 0, 0),
    (4, 10, 6, 0),
    (4, 16, 5, 0),
    (8, 16, 0, 0),
    (5, 7, 6, 4),
    (1, 9, 8, 0),
    (1, 16, 8, 0),
    (1, 4, 11, 8),
]
PADDINGS = {
    "none": None,
    "all valid": torch.ones(BATCH, 16, dtype=torch.bool),
    "left": left_padding([16, 13, 9], 16),
    "right": right_padding([16, 12, 7], 16),
    "short": right_padding([10, 9, 10], 10),
    "holes": torch.rand(BATCH, 16, generator=torch.Generator().manual_seed(0)) < 0.6,
}


def ask(function, place, padding, **options) -> tuple[LazyMask | None, Tensor]:
    """Our mask, and the dense one of transformers."""
    q_len, kv_len, q_offset, kv_offset = place
    call = dict(
        batch_size=BATCH,
        q_length=q_len,
        kv_length=kv_len,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=padding,
        **options,
    )
    return make_mask(**call), theirs.sdpa_mask(**call, allow_is_causal_skip=False)


def is_runs(mask: LazyMask) -> bool:
    """Whether the backends get bands or ranges, which are O(N)."""
    frame = Frame.plain(BATCH, 2, mask.shape[2], mask.stop, torch.device("cpu"))
    return not isinstance(lower(mask.visible, frame), Bitmap)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_functions_show_the_same_as_runs(name):
    hidden = 0
    for place, padding in itertools.product(PLACES, PADDINGS):
        got, want = ask(FUNCTIONS[name], place, PADDINGS[padding])
        assert isinstance(got, LazyMask)
        assert torch.equal(got.dense(), want), (place, padding)
        assert got.shape == want.shape == (BATCH, 1, *place[:2])
        hidden += int((~want).sum())
        apart = place[2] - place[3]
        # A symmetric window somewhere inside a cache has no name in tilewise and is asked.
        anywhere = name in ("both ways", "blocks") and apart not in (0, place[1] - place[0])
        if padding != "holes" and not anywhere:
            assert is_runs(got), (place, padding)
    assert hidden > 100


@with_remap
@pytest.mark.parametrize("base", ["causal", "bidirectional", "window", "both ways"])
def test_packed_sequences(base):
    function = theirs.packed_sequence_compatibility_function(FUNCTIONS[base], POSITIONS, PACKED)
    got, want = ask(function, (10, 10, 0, 0), None)
    assert torch.equal(got.dense(), want)
    assert is_runs(got)
    assert 0 < int(want.sum()) < want.numel() / 2


@with_remap
def test_packed_sequences_with_chunks_are_asked():
    """Chunks count from each sequence's start: not a matter of how far tokens are apart."""
    chunks = theirs.chunked_causal_mask_function(2, torch.zeros(BATCH, dtype=torch.int64))
    function = theirs.packed_sequence_compatibility_function(chunks, POSITIONS, PACKED)
    got, want = ask(function, (10, 10, 0, 0), None)
    assert torch.equal(got.dense(), want)


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("combine", [theirs.and_masks, theirs.or_masks])
def test_functions_of_the_users_own(combine, use_vmap):
    table = torch.rand(16, 16) < 0.5

    def own(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return table[q, kv] | (b == 1)

    function = combine(theirs.causal_mask_function, own)
    for place, padding in itertools.product(PLACES, ("none", "left")):
        got, want = ask(function, place, PADDINGS[padding], use_vmap=use_vmap)
        assert torch.equal(got.dense(), want), place


def test_functions_that_take_one_index_at_a_time():
    def own(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.stack([q - kv, kv - 1]).amin(0) >= 0  # of equal shapes only

    function = theirs.and_masks(theirs.causal_mask_function, own)
    got, want = ask(function, (4, 10, 6, 0), None, use_vmap=True)
    assert torch.equal(got.dense(), want)


def causal_mask_function(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """Not transformers' function of this name."""
    return kv == q


def test_functions_of_the_same_name_elsewhere_are_asked():
    got, want = ask(causal_mask_function, (10, 10, 0, 0), None)
    assert torch.equal(got.dense(), want)


def test_nothing_hidden_may_be_none():
    function = theirs.bidirectional_mask_function
    for padding in ("none", "all valid"):
        got, _ = ask(function, (10, 10, 0, 0), PADDINGS[padding], allow_is_bidirectional_skip=True)
        assert got is None
    got, want = ask(function, (10, 10, 0, 0), PADDINGS["left"], allow_is_bidirectional_skip=True)
    assert torch.equal(got.dense(), want)


def test_offsets_in_tensors():
    """Static caches count in a tensor."""
    got, want = ask(FUNCTIONS["window"], (2, 16, torch.tensor(5), 0), PADDINGS["left"])
    assert torch.equal(got.dense(), want)
    assert got.stop == 7


def test_a_mask_is_one_byte_at_any_length():
    mask = make_mask(batch_size=1, q_length=100_000, kv_length=100_000)
    assert mask.shape == (1, 1, 100_000, 100_000)
    assert mask.untyped_storage().nbytes() == 1
    assert "causal" in repr(mask)


def test_padding_must_be_two_dimensional():
    with pytest.raises(ValueError, match=r"attention_mask: shape is \[3, 1, 16\]"):
        ask(FUNCTIONS["causal"], (10, 10, 0, 0), PADDINGS["left"][:, None])


# What models do with a mask on its way.


@pytest.fixture
def mask() -> LazyMask:
    made, _ = ask(FUNCTIONS["window"], (4, 16, 5, 0), PADDINGS["left"])
    assert made is not None
    return made


def test_what_leaves_all_elements_keeps_the_pattern(mask):
    same = [
        mask[:, :, :, :16],
        mask[:, :, :, :20],
        mask[...],
        mask[:, :],
        mask.to("cpu"),
        mask.to(torch.bool),
        mask.bool(),
        mask.detach(),
        mask.clone(),
        mask.contiguous(),
    ]
    for each in same:
        assert isinstance(each, LazyMask)
        assert each.visible is mask.visible
        assert (each.stop, each.shape) == (mask.stop, mask.shape)
    assert mask.to("meta").device.type == "meta"
    assert (mask.dtype, mask.ndim, mask.dim(), mask.size(-1), len(mask)) == (
        torch.bool, 4, 4, 16, BATCH,
    )  # fmt: skip


def test_edits_yield_the_dense_mask(mask):
    dense = mask.dense()
    other = torch.rand(BATCH, 1, 4, 16) < 0.5
    edits = {
        "and": (mask & other, dense & other),
        "or": (other | mask, other | dense),
        "not": (~mask, ~dense),
        "slice": (mask[:, :, -1:, :9], dense[:, :, -1:, :9]),
        "cat": (torch.cat([mask, other], -1), torch.cat([dense, other], -1)),
        "where": (torch.where(mask, 0.0, -1.0), torch.where(dense, 0.0, -1.0)),
        "expand": (mask.expand(-1, 2, -1, -1), dense.expand(-1, 2, -1, -1)),
        "masked_fill": (other.masked_fill(mask, False), other.masked_fill(dense, False)),
        "pad": (torch.nn.functional.pad(mask, (0, 2)), torch.nn.functional.pad(dense, (0, 2))),
    }
    for name, (got, want) in edits.items():
        assert type(got) is Tensor, name
        assert torch.equal(got, want), name


def test_arithmetic_is_refused(mask):
    """True is not 1.0: added to scores it would hide nothing."""
    for edit in (
        lambda: mask + torch.rand(1),
        lambda: mask * 2.0,
        lambda: 1 - mask,
        lambda: mask.masked_fill(mask.dense(), -1e30),
    ):
        with pytest.raises(tilewise.UnsupportedError, match="attention_mask: the model calls"):
            edit()
    for cast in (lambda: mask.to(torch.float32), lambda: mask.to(dtype=torch.int64)):
        with pytest.raises(tilewise.UnsupportedError, match="attention_mask: the model casts it"):
            cast()
    for cast in (mask.float, mask.int, lambda: mask.type(torch.float32)):
        with pytest.raises(tilewise.UnsupportedError, match="attention_mask"):
            cast()
