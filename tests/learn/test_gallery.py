"""The gallery holds every mask, counts its tiles as the backends do, and draws them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from matplotlib import image

import tilewise
from tilewise import masks
from tilewise.frame import Frame
from tilewise.learn import gallery
from tilewise.lowering import lower

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found():
    return gallery.entries(256, 32)


def mask_of(item):
    names = {"m": masks, "torch": torch, "g": torch.Generator().manual_seed(0)}
    return eval(item.code, names)


def test_every_mask_of_the_algebra_is_there(found):
    named = set(re.findall(r"\bm\.(\w+)", " ".join(item.code for item in found)))
    assert named == set(masks.__all__) - {"Mask"}
    operators = " ".join(re.sub(r"lambda.*", "", item.code) for item in found)
    assert all(f" {sign} " in operators for sign in "&|") and "~m." in operators
    assert len({item.code for item in found}) == len(found)


def test_what_is_drawn_is_the_mask(found):
    frame = Frame.plain(1, 1, 256, 256, torch.device("cpu"))
    for item in found:
        lowered = lower(mask_of(item), frame)
        visible = lowered.tile((0, 256), (0, 256), torch.device("cpu"))[0, 0]
        assert torch.equal(item.visible, visible), item.code
        assert item.pairs == pytest.approx(float(visible.double().mean()), rel=1e-6)


def test_counts_are_what_explain_reports(monkeypatch):
    """In tiles of 64, where every lowered form knows its tiles exactly."""
    from tilewise import dispatch
    from tilewise.backends import tiled
    from tilewise.problem import Plan

    monkeypatch.setattr(tiled, "plan", lambda problem: Plan("tiled", 64, 64))
    dispatch.choose.cache_clear()
    x = torch.empty(1, 1, 512, 8)
    for item in gallery.entries(512, 64):
        explained = tilewise.explain(x, x, x, mask=mask_of(item), backend="tiled")
        assert explained.tiles == item.counts, item.code
        assert sum(item.counts.values()) == 64
    dispatch.choose.cache_clear()


def test_counts_known_by_heart(found):
    counts = {item.code: tuple(item.counts.values()) for item in found}
    assert counts["m.causal()"] == (28, 8, 28)
    assert counts["m.prefix(96)"] == (40, 0, 24)
    assert counts["m.window(32, 0)"] == (49, 15, 0)


def test_the_picture_shows_each_state(tmp_path, found):
    path = tmp_path / "new" / "masks.png"
    gallery.draw(path, found, 32)
    pixels = torch.from_numpy(image.imread(path)[..., :3].copy())
    assert pixels.shape[0] > 1000 and pixels.shape[1] > 1500

    def share(colour):
        want = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return float(((pixels - want).abs().amax(2) < 0.01).float().mean())

    full, skipped = (gallery._FULL, gallery._SKIPPED)
    tiles = {name: sum(item.counts[name] for item in found) for name in found[0].counts}
    assert share(full) > 0.02 and share(gallery._PARTIAL) > 0.01 and share(gallery._HIDDEN) > 0.02
    # Areas of solid colour follow the counts; tile borders and hatching take their part of each.
    assert 0.7 < (share(full) / share(skipped)) / (tiles["full"] / tiles["skipped"]) < 2


def test_lengths_that_no_block_divides(tmp_path):
    found = gallery.entries(100, 48)
    assert all(item.states.shape == (3, 3) for item in found)
    gallery.draw(tmp_path / "odd.png", found[:3], 48)
    assert (tmp_path / "odd.png").stat().st_size > 0


def test_the_table_of_the_documentation_is_this_one():
    page = (ROOT / "docs" / "learn" / "masks.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `(.*m\..*)` \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) % \|$", page, re.M)
    want = [
        (item.code.replace("|", "\\|"), *map(str, item.counts.values()), f"{100 * item.pairs:.1f}")
        for item in gallery.entries()
    ]
    assert found == want


@pytest.mark.parametrize(
    "length, block, message",
    [
        (32, 8, "length: got 32, need 64 to 1024"),
        (4096, 64, "length: got 4096, need 64 to 1024"),
        (256, 0, "block: got 0, need 8 to 256"),
        (256, 4, "block: got 4, need 8 to 256"),
        (256, 512, "block: got 512"),
    ],
)
def test_bad_sizes_are_named(length, block, message):
    with pytest.raises(ValueError, match=message):
        gallery.entries(length, block)
