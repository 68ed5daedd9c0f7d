from __future__ import annotations

import pytest

from tilewise.bench import timing
from tilewise.bench.grid import make_case
from tilewise.bench.timing import Settings


class FakeTime:
    """A clock for steps that say how long they take, and the record of who was called."""

    def __init__(self, **seconds: float) -> None:
        self.at = 0.0
        self.called: list[str] = []
        self.steps = {name: self._step(name, took) for name, took in seconds.items()}

    def _step(self, name, took):
        def step():
            self.called.append(name)
            self.at += took

        return step

    def now(self) -> float:
        return self.at

    def clock(self, step, calls) -> float:
        start = self.at
        for _ in range(calls):
            step()
        return self.at - start


def test_steps_are_interleaved():
    fake = FakeTime(a=1.0, b=2.0, c=3.0)
    settings = Settings(warmup=2, least=3, most=3)
    timings = timing.interleaved(fake.steps, clock=fake.clock, settings=settings, now=fake.now)
    assert "".join(fake.called) == "aabbcc" + "abc" * 3
    assert [timings[name].median for name in "abc"] == [1.0, 2.0, 3.0]
    assert all(timings[name].samples == 3 for name in "abc")


def test_the_budget_ends_the_rounds_but_not_before_the_least():
    fake = FakeTime(a=1.0)
    settings = Settings(least=2, most=100, budget_s=7.0)
    found = timing.interleaved(fake.steps, clock=fake.clock, settings=settings, now=fake.now)
    assert found["a"].samples == 7
    settings = Settings(least=4, most=100, budget_s=0.0)
    found = timing.interleaved(fake.steps, clock=fake.clock, settings=settings, now=fake.now)
    assert found["a"].samples == 4


def test_short_steps_are_called_several_times_a_sample():
    fake = FakeTime(short=0.25, long=10.0)
    settings = Settings(least=1, most=1, sample_s=2.0)
    found = timing.interleaved(fake.steps, clock=fake.clock, settings=settings, now=fake.now)
    assert fake.called == ["short", "long", *["short"] * 8, "long"]
    assert (found["short"].calls, found["long"].calls) == (8, 1)
    assert found["short"].median == 0.25


def test_rounds_are_reported_up_to_the_whole():
    fake = FakeTime(a=1.0)
    shares: list[float] = []
    timing.interleaved(
        fake.steps,
        clock=fake.clock,
        settings=Settings(least=2, most=9, budget_s=4.0),
        now=fake.now,
        on_round=shares.append,
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize("bad", [{"least": 0}, {"least": 5, "most": 4}, {"warmup": 0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match="repetitions"):
        Settings(**bad)


def test_median_and_quartiles():
    found = timing.summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.lower, found.upper, found.best) == (3.0, 2.0, 4.0, 1.0)
    assert found.spread == pytest.approx(2 / 3)
    assert timing.summarise([2.0]).spread == 0.0
    with pytest.raises(ValueError, match="samples"):
        timing.summarise([])


def test_flops_are_the_papers():
    full = make_case((2, 3, 128, 64))
    assert timing.flops(full) == 4 * 2 * 3 * 128 * 128 * 64
    causal = make_case((2, 3, 128, 64), mask="causal")
    assert timing.flops(causal) == timing.flops(full) / 2
    backward = make_case((2, 3, 128, 64), mode="backward")
    assert timing.flops(backward) == 2.5 * timing.flops(full)
    both = make_case((2, 3, 128, 64), mode="both", mask="causal")
    assert timing.flops(both) == 3.5 * timing.flops(causal)


def test_flops_of_other_shapes_and_masks():
    narrow = make_case((1, 2, 64, 32), v_dim=96, kv_len=128, kv_heads=1)
    assert timing.flops(narrow) == 2 * 2 * 64 * 128 * (32 + 96)
    window = make_case((1, 1, 8, 16), mask="window:1")
    assert timing.flops(window) == 4 * 15 * 16
    step = make_case((1, 2, 100, 16), mode="decode", mask="causal")
    assert timing.flops(step) == 4 * 2 * 100 * 16


def test_bytes_are_those_of_inputs_and_output():
    case = make_case((2, 8, 100, 64), dtype="float16", mode="decode", kv_heads=2, v_dim=32)
    tensors = 2 * 8 * 1 * 64 + 2 * 2 * 100 * 64 + 2 * 2 * 100 * 32 + 2 * 8 * 1 * 32
    assert timing.bytes_moved(case) == 2 * tensors


def test_geometric_mean():
    assert timing.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert timing.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="values"):
        timing.geometric_mean([])


def test_speedup_counts_shared_cases_alone():
    ours = {"x": 1.0, "y": 2.0, "only ours": 9.0}
    base = {"x": 2.0, "y": 16.0, "only theirs": 9.0}
    ratio, cases = timing.speedup(ours, base)
    assert ratio == pytest.approx(4.0)
    assert cases == 2
    assert timing.speedup(ours, {"z": 1.0}) is None


def test_the_wall_clock_counts_calls():
    calls = []
    assert timing.wall_clock(lambda: calls.append(1), 3) > 0
    assert len(calls) == 3
    assert timing.clock_for("cpu") is timing.wall_clock
    assert timing.clock_for("cuda") is timing.cuda_clock
