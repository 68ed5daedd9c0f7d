"""Every backend on the same generated cases, forward and backward, against float64."""

from __future__ import annotations

import hypothesis
import pytest
import torch

import tilewise
from tilewise.testing import tolerance
from tilewise.testing.cases import FEATURES, Case, grid
from tilewise.testing.poison import poisoned
from tilewise.testing.strategies import cases

BACKENDS = tilewise.dispatch.BACKENDS
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TILE = 16  # the grid's problems are 37 by 37 and more: several tiles, the last one ragged
GROUPS = ("plain", *(feature.name for feature in FEATURES))


def group_of(dtype: torch.dtype, first: str) -> list[Case]:
    """The feature ``first`` alone and its pairs with the features after it."""
    return [case for name, case in grid(dtype) if name.split("+")[0] == first]


@pytest.mark.parametrize("first", GROUPS)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, id=str(dtype)[6:], marks=[pytest.mark.slow] if slow else [])
        for dtype, slow in zip(DTYPES, (False, False, True, True), strict=True)
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_option_alone_and_in_pairs(backend, dtype, first, tile_sizes, compared):
    tile_sizes(TILE, TILE)
    group = group_of(dtype, first)
    with poisoned():
        for case in group:
            tiles = -(-case.kv_len // TILE)
            tolerance.check(case.make(), tilewise.attention, tiles=tiles, backend=backend)
    compared(f"{backend}, {str(dtype)[6:]}, options alone and in pairs", len(group))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_mixture(backend, dtype, tile_sizes, compared):
    count = 0

    @hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(cases(dtypes=(dtype,)))
    def mixture(case):
        nonlocal count
        count += 1
        tile_sizes(32, 48)
        with poisoned():
            tolerance.check(case.make(), tilewise.attention, tiles=3, backend=backend)

    mixture()
    compared(f"{backend}, {str(dtype)[6:]}, drawn mixtures", count)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [1, 3, 128, 255, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_head_dims(head_dim, dtype, tile_sizes, compared):
    tile_sizes(64, 64)
    case = Case(1, 4, 2, 129, 127, head_dim, head_dim, dtype=dtype, mask="causal")
    tolerance.check(case.make(), tilewise.attention, tiles=2, backend="tiled")
    compared("tiled, head_dim 1 to 512", 1)


@pytest.mark.parametrize("length", [1, 17, 127, 128, 129, 300])
@pytest.mark.parametrize("tile", [(64, 64), (128, 32), (1, 300), (37, 41)])
def test_tile_sizes(length, tile, tile_sizes, compared):
    tile_sizes(*tile)
    case = Case(1, 2, 1, length, length + 9, 32, 32, mask="documents", alibi="h", dropout_p=0.2)
    with poisoned():
        tiles = -(-(length + 9) // tile[1])
        tolerance.check(case.make(), tilewise.attention, tiles=tiles, backend="tiled")
    compared("tiled, tile sizes", 1)
