from __future__ import annotations

import pytest

from tilewise.learn import io_model, io_plot, roofline
from tilewise.learn.io_model import ALGORITHMS, counted, leading, predicted
from tilewise.learn.ladder.memory import SramFull

GRID = [(n, d, m) for n in (96, 250, 384) for d in (16, 33, 64) for m in (1024, 5000, 16_384)]
LARGE = [(2048, 64, 8192), (4096, 128, 65_536), (1500, 64, 4096)]
"""Sizes at which N d is at least 8 M, so that the terms in N squared should be nearly all."""


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_count_is_the_formula_over_a_grid(algorithm, compared):
    for n, d, m in GRID:
        m = max(m, 16 * d)
        got, want = counted(algorithm, n, d, m), predicted(algorithm, n, d, m)
        assert got == want, (n, d, m)
        assert abs(got.moved - want.moved) <= 0.05 * got.moved
    compared(f"traffic of {algorithm}", len(GRID))


@pytest.mark.parametrize("n, d, m", LARGE)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_papers_leading_term_is_within_five_percent(algorithm, n, d, m):
    assert n * d >= 8 * m
    moved = predicted(algorithm, n, d, m).moved
    assert abs(leading(algorithm, n, d, m) - moved) <= 0.05 * moved


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_large_run_moves_the_leading_term(algorithm):
    n, d, m = LARGE[0]
    moved = counted(algorithm, n, d, m).moved
    assert abs(leading(algorithm, n, d, m) - moved) <= 0.05 * moved


@pytest.mark.parametrize("n, d, m", [(128, 16, 1024), (96, 64, 1024), (200, 16, 512)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_everything_fits_on_a_chip_of_twice_m(algorithm, n, d, m):
    assert counted(algorithm, n, d, m, watched=True) == predicted(algorithm, n, d, m)


def test_the_chip_of_a_watched_run_is_a_real_limit(monkeypatch):
    monkeypatch.setattr(io_model, "block_sizes", lambda m, d: (m // d, m // d))
    with pytest.raises(SramFull):
        counted("FlashAttention-2", 128, 16, 1024, watched=True)


def test_traffic_scales_as_the_theorem_says():
    for algorithm in ALGORITHMS[1:]:
        base = leading(algorithm, 1024, 64, 8192)
        assert leading(algorithm, 2048, 64, 8192) == 4 * base
        assert leading(algorithm, 1024, 128, 8192) == 4 * base
        assert leading(algorithm, 1024, 64, 16_384) == base / 2
    ratio = leading("FlashAttention-1", 1024, 64, 8192) / leading(
        "FlashAttention-2", 1024, 64, 8192
    )
    assert ratio == 1.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("flash", 8, 8, 512), "algorithm: got 'flash', need one of standard"),
        (("standard", 0, 8, 512), "sizes: got n = 0"),
        (("standard", 8, 8, 100), "m: got 100 for d = 8, need at least 128"),
        (("standard", 513, 8, 512), "whole rows"),
    ],
)
def test_sizes_beyond_the_model_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        predicted(*arguments)


def test_a_roofline_is_a_slope_and_a_ceiling():
    gpu = roofline.A100
    assert gpu.attainable(1.0) == gpu.bandwidth
    assert gpu.attainable(gpu.ridge) == pytest.approx(gpu.peak)
    assert gpu.attainable(1e6) == gpu.peak
    standard, first, second = roofline.modelled(gpu, 4096, 128)
    assert standard.intensity < first.intensity < second.intensity
    assert second.rate <= gpu.peak
    # 4 N^2 d operations on 4 N^2 numbers of 2 bytes: less than d / 2 a byte.
    assert standard.intensity < 64


def test_this_machine_is_measured_and_drawn(tmp_path):
    here = roofline.this_machine(budget_s=0.0, sizes=(64,), copied=2**12)
    assert here.peak > 1e6 and here.bandwidth > 1e6 and here.sram >= 2**14
    assert "64 x 64" in here.source and "second-level cache" in here.source
    points = roofline.measured(here, n=64, d=16, budget_s=0.0)
    assert [point.name for point in points][:3] == list(ALGORITHMS)
    assert points[3].name.startswith("tilewise, ")
    assert points[3].intensity == points[2].intensity
    assert all(point.measured and point.rate > 0 for point in points)
    rows = io_model.table((128, 256), 16, 1024)
    assert all(row["counted"] == row["predicted"] for row in rows)
    places = [(roofline.H100, roofline.modelled(roofline.H100, 4096, 128)), (here, points)]
    io_plot.traffic(tmp_path / "io.png", rows, footer="test")
    io_plot.rooflines(tmp_path / "roofline.png", places, "test")
    for name in ("io.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
