"""FlexAttention's example masks in tilewise: entry by entry, tile by tile, and against float64."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import tilewise
from tilewise import masks as m
from tilewise.compat.sdpa import as_mask, flex_attention
from tilewise.frame import Frame
from tilewise.lowering import lower
from tilewise.testing import tolerance
from tilewise.testing.cases import Case
from tilewise.tiles import FULL, SKIP, Band, Bitmap, Ranges

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compat" / "flex_masks.md"

_spec = importlib.util.spec_from_file_location("flex_masks", ROOT / "examples" / "flex_masks.py")
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

LENGTH = 144  # two tiles of 64 and a part of one; 12 x 12 in two dimensions
TILE = 64
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

STARTS = torch.tensor([0, 50, 51, 110, LENGTH])
IDS = torch.repeat_interleave(torch.arange(4), STARTS.diff())
PREFIX_OF = torch.tensor([0, 0, 2, 2])
FIRST = torch.arange(LENGTH) < 3
SCATTERED = torch.arange(LENGTH) % 60 == 5


class Example(NamedTuple):
    mask: Callable[[], m.Mask]
    mask_mod: MaskMod
    form: type


def documents_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (IDS[q] == IDS[kv]) & (q - STARTS[IDS[q]] >= kv - STARTS[IDS[kv]])


def global_mod(is_global: Tensor) -> MaskMod:
    return lambda b, h, q, kv: ((q - kv).abs() <= 9) | is_global[q] | is_global[kv]


def shared_prefix_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    own, prefix = IDS[q], PREFIX_OF[IDS[q]]
    inside_prefix = (kv >= STARTS[prefix]) & (kv < STARTS[prefix + 1])
    return ((kv >= STARTS[own]) & (kv <= q)) | ((own != prefix) & inside_prefix)


def kernel(q: Tensor, kv: Tensor, size: int, reach: int) -> Tensor:
    """Within ``reach`` of the query, whose place is moved so that the kernel stays inside."""
    centre = torch.minimum(torch.maximum(q, q * 0 + reach), q * 0 + size - 1 - reach)
    return (centre - kv).abs() <= reach


def natten_2d_mod(side: int, reach: int, tile: int) -> MaskMod:
    """The place of each token is looked up in a table, which the example works out instead."""
    squares = torch.arange(side * side).view(side // tile, tile, side // tile, tile)
    place = squares.transpose(1, 2).flatten()  # where in the picture, row by row, a token stands

    def mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        q, kv = place[q], place[kv]
        rows = kernel(q // side, kv // side, side, reach)
        return rows & kernel(q % side, kv % side, side, reach)

    return mod


def block_diffusion_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    half, block = LENGTH // 2, 8
    noised_q, noised_kv = q < half, kv < half
    block_q, block_kv = q % half // block, kv % half // block
    diagonal = (block_q == block_kv) & (noised_q == noised_kv)
    to_clean = (block_q > block_kv) & noised_q & ~noised_kv
    return diagonal | to_clean | ((block_q >= block_kv) & ~noised_q & ~noised_kv)


EXAMPLES = {
    "causal": Example(example.causal, lambda b, h, q, kv: q >= kv, Band),
    "sliding window": Example(
        lambda: example.sliding_window(9), lambda b, h, q, kv: (q - kv <= 9) & (q >= kv), Band
    ),
    "prefix LM": Example(
        lambda: example.prefix_lm(70), lambda b, h, q, kv: (kv < 70) | (q >= kv), Ranges
    ),
    "documents": Example(
        lambda: example.packed_documents(STARTS.diff().tolist()), documents_mod, Ranges
    ),
    "dilated window": Example(
        lambda: example.dilated_window(13, 3),
        lambda b, h, q, kv: ((q - kv).abs() <= 13) & ((q - kv).abs() % 3 == 0),
        Bitmap,
    ),
    "global": Example(lambda: example.global_and_window(9, FIRST), global_mod(FIRST), Ranges),
    "global anywhere": Example(
        lambda: example.global_and_window(9, SCATTERED), global_mod(SCATTERED), Bitmap
    ),
    "shared prefix": Example(
        lambda: example.shared_prefix(STARTS.diff().tolist(), PREFIX_OF.tolist()),
        shared_prefix_mod,
        Ranges,
    ),
    "NATTEN 1-D": Example(
        lambda: example.natten_1d(LENGTH, 15),
        lambda b, h, q, kv: kernel(q, kv, LENGTH, 7),
        Ranges,
    ),
    "NATTEN 1-D, nearly everything": Example(
        lambda: example.natten_1d(LENGTH, 141),
        lambda b, h, q, kv: kernel(q, kv, LENGTH, 70),
        Ranges,
    ),
    "NATTEN 2-D": Example(lambda: example.natten_2d(12, 12, 5), natten_2d_mod(12, 2, 1), Bitmap),
    "NATTEN 2-D, tiled": Example(
        lambda: example.natten_2d(12, 12, 5, 4), natten_2d_mod(12, 2, 4), Bitmap
    ),
    "block diffusion": Example(
        lambda: example.block_diffusion(LENGTH // 2, 8), block_diffusion_mod, Ranges
    ),
}
each = pytest.mark.parametrize("name", EXAMPLES)


def lowered(mask: m.Mask) -> Any:
    return lower(mask, Frame.plain(1, 1, LENGTH, LENGTH, torch.device("cpu")))


@each
def test_the_same_entries(name):
    """By the mask's own definition, and by the form that the backends get."""
    mask, mod, form = EXAMPLES[name].mask(), EXAMPLES[name].mask_mod, EXAMPLES[name].form
    want = create_mask(mod, 1, 1, LENGTH, LENGTH, device="cpu")
    at = Frame.plain(1, 1, LENGTH, LENGTH, torch.device("cpu")).entries(0, LENGTH)
    assert torch.equal(mask.contains(at).expand_as(want), want)
    form_of_it = lowered(mask)
    assert type(form_of_it) is form
    whole = (0, LENGTH)
    assert torch.equal(form_of_it.tile(whole, whole, torch.device("cpu")), want)


@each
def test_the_same_tiles(name):
    """As FlexAttention counts them for its block masks, and by either way into tilewise."""
    mod = EXAMPLES[name].mask_mod
    sizes = (None, None, LENGTH, LENGTH)
    block_mask = create_block_mask(mod, *sizes, device="cpu", BLOCK_SIZE=TILE)
    table = lowered(EXAMPLES[name].mask()).table(TILE, TILE)
    assert torch.equal(table != SKIP, block_mask.to_dense() != 0)
    assert torch.equal(table, lowered(as_mask(block_mask)).table(TILE, TILE))
    # Tiles within the sequences: PyTorch counts those that stick out as partial.
    full = torch.zeros_like(table[0, 0], dtype=torch.bool)
    for row, count in enumerate(block_mask.full_kv_num_blocks[0, 0].tolist()):
        full[row, block_mask.full_kv_indices[0, 0, row, :count].long()] = True
    inside = LENGTH // TILE
    assert torch.equal(table[0, 0, :inside, :inside] == FULL, full[:inside, :inside])


@each
def test_results_and_gradients(name):
    """``tilewise.attention``, and both kinds of ``block_mask``, within the derived bounds."""
    mask, mod = EXAMPLES[name].mask(), EXAMPLES[name].mask_mod
    block_mask = create_block_mask(mod, None, None, LENGTH, LENGTH, device="cpu")
    visible = create_mask(mod, 1, 1, LENGTH, LENGTH, device="cpu")
    case = Case(q_heads=2, kv_heads=2, q_len=LENGTH, kv_len=LENGTH, head_dim=8, v_dim=8)
    call = replace(case.make(), options={"mask": m.from_bool(visible)})

    def ours(q: Tensor, k: Tensor, v: Tensor, **ignored: Any) -> Any:
        return tilewise.attention(q, k, v, mask=mask, return_lse=True)

    def theirs(q: Tensor, k: Tensor, v: Tensor, **ignored: Any) -> Any:
        return flex_attention(q, k, v, block_mask=block_mask, return_lse=True)

    def named(q: Tensor, k: Tensor, v: Tensor, **ignored: Any) -> Any:
        return flex_attention(q, k, v, block_mask=mask, return_lse=True)

    for attention in (ours, theirs, named):
        tolerance.check(call, attention, tiles=-(-LENGTH // 16))


def test_the_page_shows_what_the_example_computes():
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows == example.table().splitlines()


def test_the_page_shows_the_masks_of_the_example():
    page = PAGE.read_text(encoding="utf-8")
    makers = {make for _, make, _, _ in example.EXAMPLES}
    assert len(makers) == 10
    assert all(f"\n{inspect.getsource(make)}" in page for make in makers)
