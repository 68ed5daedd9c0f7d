"""A kernel that does not fit gives way to one with smaller tiles; other failures are not hidden."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

import tilewise
from tilewise.backends.triton import launch, retry
from tilewise.backends.triton.plan import INTERPRETER, Tile, plan_for
from tilewise.testing import tolerance
from tilewise.testing.cases import Case

SMALL = Case(batch=1, q_heads=2, kv_heads=1, q_len=40, kv_len=50, mask="causal")


class Refusing:
    """A kernel whose every launch fails."""

    def __init__(self, name, error):
        self.__name__, self.error = name, error

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **named):
        raise self.error


@pytest.fixture
def limit(monkeypatch):
    """Refuse every tile with more keys than ``limit.keys``, and record those that were tried."""

    class Limit:
        keys = 1024
        error: Exception = OutOfResources(1, 0, "shared memory")
        tried: list = []  # noqa: RUF012

    stock = launch.run

    def run(kernel, grid, architecture, arguments, named):
        if named.get("BLOCK_KV", 0) > Limit.keys:
            kernel = Refusing(kernel.__name__, Limit.error)
        else:
            Limit.tried.append(named.get("BLOCK_KV"))
        stock(kernel, grid, architecture, arguments, named)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(retry, "_replaced", {})
    return Limit


@pytest.mark.filterwarnings("ignore:triton.*does not fit:RuntimeWarning")
def test_results_are_right_with_the_tiles_that_fit(limit):
    limit.keys = 16
    tolerance.check(SMALL.make(), tilewise.attention, tiles=4, backend="triton")
    assert 16 in limit.tried and 32 not in limit.tried


def test_a_warning_names_what_failed_and_comes_once(limit):
    limit.keys = 16
    x = torch.randn(1, 1, 40, 16)
    with pytest.warns(RuntimeWarning, match=r"forward_kernel does not fit on interpreter with .*"):
        first = tilewise.attention(x, x, x, backend="triton")
    again = tilewise.attention(x, x, x, backend="triton")  # a warning would be an error here
    assert torch.equal(first, again)


@pytest.mark.filterwarnings("ignore:triton.*does not fit:RuntimeWarning")
def test_the_smallest_tiles_are_the_last_try(limit):
    limit.keys = 8
    x = torch.randn(1, 1, 40, 16)
    with pytest.raises(launch.DoesNotFit, match=r"BLOCK_Q=16, BLOCK_KV=16"):
        tilewise.attention(x, x, x, backend="triton")


def test_another_failure_is_not_tried_again(limit):
    limit.keys = 16
    limit.error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    x = torch.randn(1, 1, 40, 16)
    with pytest.raises(RuntimeError, match="failed on interpreter") as caught:
        tilewise.attention(x, x, x, backend="triton")
    assert not isinstance(caught.value, launch.DoesNotFit)


@pytest.mark.parametrize(
    "error, answer",
    [
        (OutOfResources(300_000, 232_448, "shared memory"), True),
        (PTXASError("uses too much shared data"), True),
        (RuntimeError("PassManager::run failed"), True),
        (RuntimeError("Triton Error [CUDA]: too many resources requested, out of resources"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
        (ValueError("arguments: got a list"), False),
        (TypeError("PassManager::run failed"), False),
    ],
)
def test_which_failures_lie_in_the_tiles(error, answer):
    assert launch.does_not_fit(error) is answer


def test_every_tile_becomes_the_smallest_in_the_end():
    tile = Tile(128, 64, 8, 3)
    seen = [tile]
    while (tile := retry.smaller_tile(tile)) != seen[-1]:
        seen.append(tile)
    assert seen[1] == Tile(128, 64, 8, 1), "stages first"
    assert seen[-1] == Tile(16, 16, 8, 1)
    assert all(a.block_q * a.block_kv >= b.block_q * b.block_kv for a, b in pairwise(seen))


def test_a_plan_shrinks_as_a_whole_and_says_what_runs():
    call = SMALL.make()
    problem = tilewise.explain(call.q, call.k, call.v, **call.options).problem
    plan = plan_for(problem, INTERPRETER)
    smaller = retry.smaller_plan(plan)
    assert smaller is not None
    runs = smaller.decode if smaller.parts else smaller.forward
    assert (smaller.block_q, smaller.block_kv) == (runs.block_q, runs.block_kv)
    assert smaller.dq.block_q * smaller.dq.block_kv < plan.dq.block_q * plan.dq.block_kv
