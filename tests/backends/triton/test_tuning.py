"""Timed tiles: the search with a timer that knows the answer, the file, and what plans take of it.

The kernels run in the interpreter, so that every candidate's results are looked at.
"""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import replace

import pytest
import torch

from tilewise.backends import triton as backend
from tilewise.backends.triton import tuning
from tilewise.backends.triton.launch import DoesNotFit
from tilewise.backends.triton.plan import INTERPRETER, Architecture, Tile, plan_for, tile_key
from tilewise.backends.triton.tuning import Call, Trial
from tilewise.bench.grid import make_case
from tilewise.tune import call_of

H100 = Architecture("sm_90", 132, 50 * 2**20)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own; what is loaded is forgotten before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend._prepare()
    tuning.load.cache_clear()
    yield tmp_path / "tilewise"
    tuning.load.cache_clear()


def call(mode="both", length=20, dim=16, **options) -> Call:
    softcap = options.pop("softcap", 0.0)
    return call_of(make_case((1, 1, length, dim), mode=mode, **options), softcap, "cpu")


class Clock:
    """Runs a step and answers as if its time depended on its tile alone. ``ideal`` takes 1 s, each
    halving or doubling on the way to it 1 s more."""

    def __init__(self, monkeypatch, ideal: Tile) -> None:
        self.ideal, self.tile = ideal, ideal
        stock = tuning.plan_for

        def plan(problem, architecture, **options):
            self.tile = next(iter(options.get("tuned", {}).values()), self.tile)
            return stock(problem, architecture, **options)

        monkeypatch.setattr(tuning, "plan_for", plan)

    def __call__(self, step) -> float:
        step()
        return self.of(self.tile)

    def of(self, tile: Tile) -> float:
        steps = abs(tile.block_q.bit_length() - self.ideal.block_q.bit_length())
        steps += abs(tile.block_kv.bit_length() - self.ideal.block_kv.bit_length())
        steps += abs(tile.warps - self.ideal.warps) // 4 + abs(tile.stages - self.ideal.stages)
        return 1.0 + steps


def best_of(trials: list[Trial]) -> dict[str, Tile]:
    return {trial.key[0]: trial.tile for trial in trials if trial.best}


def test_every_kernel_of_a_call_is_tuned(monkeypatch):
    ideal = Tile(16, 64, 8, 2)
    told = []
    trials = tuning.tune(
        [call()], INTERPRETER, Clock(monkeypatch, ideal), lambda *what: told.append(what)
    )
    assert best_of(trials) == dict.fromkeys(("forward", "dkdv", "dq", "fused"), ideal)
    assert not [trial for trial in trials if trial.reason]
    assert [trial.tile for trial in trials if trial.first] == 4 * [Tile(32, 32, 4, 1)]
    assert told[0] == ("forward 32x32, 4 warps, 1 stages", 0, 4) and told[-1][1:] == (4, 4)
    assert len(trials) == len({(trial.key, trial.tile) for trial in trials}), "no tile twice"


def test_which_kernels_a_call_has():
    half = replace(call().problem, dtype=torch.float16, q_len=100, head_dim=64, v_dim=64)
    assert tuning.kernels_of(half, H100) == ("forward", "dkdv", "dq", "fused")
    assert tuning.kernels_of(replace(half, head_dim=256), H100) == ("forward", "dkdv", "dq")
    assert tuning.kernels_of(replace(half, needs_grad=False), H100) == ("forward",)
    assert tuning.kernels_of(call("decode").problem, INTERPRETER) == ("decode",)


def test_decoding_keeps_the_rows_that_the_call_gives_it(monkeypatch):
    one = call("decode")
    trials = tuning.tune([one], INTERPRETER, Clock(monkeypatch, Tile(64, 16, 8, 2)))
    rows = plan_for(one.problem, INTERPRETER).decode.block_q
    assert {trial.tile.block_q for trial in trials} == {rows}
    assert best_of(trials) == {"decode": Tile(rows, 16, 8, 2)}


def test_calls_with_one_key_are_taken_together(monkeypatch):
    """The time is the geometric mean: one call likes a tile that the other suffers from."""
    calls = [call("forward", length=length) for length in (20, 24)]
    ran = []

    def timer(step):
        step()
        ran.append(clock.tile)
        good = 4.0 if clock.tile.warps == 8 else 2.0
        return good if len(ran) % 2 else 9 / good

    clock = Clock(monkeypatch, Tile(32, 32, 4, 1))
    trials = tuning.tune(calls, INTERPRETER, timer)
    assert ran[0::2] == ran[1::2], "each tile by both calls"
    assert all(trial.seconds == pytest.approx(3.0) for trial in trials)
    assert best_of(trials) == {"forward": Tile(32, 32, 4, 1)}, "not by a rounding"


def test_tiles_that_cannot_be_used_are_passed_over_and_named(monkeypatch):
    from tilewise.backends.triton import forward_pass

    stock = forward_pass.forward
    ideal = Tile(64, 64, 8, 2)

    def forward(problem, inputs, plan):
        tile = plan.forward
        if tile.block_q == 64:
            raise DoesNotFit("forward_kernel does not fit")
        if tile.warps == 8:
            raise RuntimeError("forward_kernel failed") from ValueError("in the compiler")
        out, lse = stock(problem, inputs, plan)
        return (out if tile.stages == 1 else out * 1.5), lse

    monkeypatch.setattr(forward_pass, "forward", forward)
    trials = tuning.tune([call("forward")], INTERPRETER, Clock(monkeypatch, ideal))
    assert best_of(trials) == {"forward": Tile(32, 64, 4, 1)}
    reasons = {trial.tile: trial.reason for trial in trials if trial.reason}
    name = "1,1,20,16 float32 none forward"
    assert reasons[Tile(64, 32, 4, 1)] == f"{name}: forward_kernel does not fit"
    assert reasons[Tile(32, 32, 8, 1)] == f"{name}: forward_kernel failed: in the compiler"
    assert f"{name}: wrong results: " in reasons[Tile(32, 32, 4, 2)]
    assert all((trial.seconds is None) == (trial.reason is not None) for trial in trials)


def test_a_tile_that_leaves_something_unwritten_is_wrong(monkeypatch):
    from tilewise.backends.triton import dq

    stock = dq.run

    def run(problem, inputs, plan, shared, d_q, *rest):
        if plan.dq.block_q == 32:
            stock(problem, inputs, plan, shared, d_q, *rest)

    monkeypatch.setattr(dq, "run", run)
    trials = tuning.tune([call()], INTERPRETER, Clock(monkeypatch, Tile(64, 32, 4, 1)))
    assert best_of(trials)["dq"] == Tile(32, 32, 4, 1)
    reasons = [t.reason for t in trials if t.key[0] == "dq" and t.tile.block_q != 32]
    assert reasons and all("other entries are finite" in reason for reason in reasons)


def test_without_any_tile_that_runs_nothing_is_best(monkeypatch):
    from tilewise.backends.triton import forward_pass

    def forward(*rest):
        raise DoesNotFit("too large")

    monkeypatch.setattr(forward_pass, "forward", forward)
    trials = tuning.tune([call("forward")], INTERPRETER, Clock(monkeypatch, Tile(64, 32, 4, 1)))
    assert trials and best_of(trials) == {}
    tuning.save("interpreter", "none", trials)
    assert tuning.read("interpreter") == {}


@pytest.mark.parametrize("mask, widest", [("band", 256), ("bitmap", 64)])
def test_the_search_is_bounded(mask, widest):
    """However good larger tiles are."""
    seen = tuning.climb(
        Tile(32, 32, 4, 1), "dkdv", mask, lambda tile: 1 / (tile.block_q * tile.block_kv)
    )
    assert len(seen) <= tuning.MOST_TRIALS
    assert max(tile.block_kv for tile in seen) == widest
    assert tuning.fastest(Tile(32, 32, 4, 1), seen).block_kv == widest
    for tile in seen:
        assert tile.block_q in tuning.SIDES and tile.block_kv in tuning.SIDES
        assert tile.warps in tuning.WARPS and tile.stages in tuning.STAGES


def test_the_search_ends_after_so_many_trials(monkeypatch):
    monkeypatch.setattr(tuning, "MOST_TRIALS", 9)
    seen = tuning.climb(
        Tile(16, 16, 4, 1), "dkdv", "none", lambda tile: 1 / (tile.block_q * tile.block_kv)
    )
    assert len(seen) == 9


def test_a_gain_within_the_noise_is_none():
    first, other = Tile(32, 32, 4, 1), Tile(64, 32, 4, 1)
    assert tuning.fastest(first, {first: 1.0, other: 0.995}) == first
    assert tuning.fastest(first, {first: 1.0, other: 0.98}) == other
    assert tuning.fastest(first, {first: "fails", other: 5.0}) == other
    assert tuning.fastest(first, {first: "fails", other: "fails"}) == first


# The file.

TILE = Tile(64, 16, 8, 2)


def written(problem, kernel="forward", tile=TILE, architecture="interpreter"):
    trial = Trial(tile_key(kernel, problem), tile, 1.0, best=True)
    return tuning.save(architecture, "a GPU", [trial])


def test_plans_take_what_was_written(folder):
    problem = call().problem
    assert backend.plan(problem) == plan_for(problem, INTERPRETER)
    tuning.load.cache_clear()
    file = written(problem)
    assert file == folder / "tiles-interpreter.json"
    assert [path.name for path in folder.iterdir()] == [file.name], "no half file is left"
    written(problem, "dq", replace(TILE, stages=1))  # beside the first
    plan = backend.plan(problem)
    assert plan.forward == TILE and plan.dq == replace(TILE, stages=1)
    assert (plan.block_q, plan.block_kv) == (64, 16), "what explain shows"
    assert plan.dkdv == plan_for(problem, INTERPRETER).dkdv
    for other in ({"softcap": 1.0}, {"mask": "ranges"}, {"head_dim": 100}, {"dtype": torch.half}):
        changed = replace(problem, **other)
        assert backend.plan(changed) == plan_for(changed, INTERPRETER), other
    longer = replace(problem, q_len=5000, kv_len=5000, batch=7)
    assert backend.plan(longer).forward == TILE, "lengths do not matter"
    file.unlink()
    assert backend.plan(problem).forward == TILE, "the file is read once"


def test_a_tuned_decode_and_fused_tile():
    token = call("decode").problem
    assert plan_for(token, INTERPRETER, tuned={tile_key("decode", token): TILE}).decode == replace(
        TILE, block_q=plan_for(token, INTERPRETER).decode.block_q
    )
    problem = call().problem
    tuned = {tile_key("fused", problem): TILE}
    assert plan_for(problem, INTERPRETER, fused=True, tuned=tuned).fused == TILE
    assert plan_for(problem, INTERPRETER, tuned=tuned).fused is None, "only where it is asked for"


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_every_key_survives_the_file(kernel):
    for options in ({}, {"softcap": 2.0, "mask": "bitmap", "head_dim": 300}, {"dtype": torch.half}):
        problem = replace(call().problem, **options)
        written(problem, kernel)
        assert tuning.read("interpreter")[tile_key(kernel, problem)] == TILE


def spoil(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


ROW = {"kernel": "forward", "bytes": 4, "dim": 64, "rich": False, "mask": "none"}
DAMAGED = {
    "not JSON": lambda file: file.write_text(file.read_text()[:50]),
    "not a text file": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "not written by tilewise tune": lambda file: file.write_text("[1, 2]"),
    "for 'sm_90', need 'interpreter'": lambda file: spoil(file, architecture="sm_90"),
    "damaged": lambda file: spoil(file, tiles=[ROW]),
    "no such tile": lambda file: spoil(file, tiles=[ROW | {"tile": [48, 32, 4, 1]}]),
    "damaged ": lambda file: spoil(file, tiles=None),
    "no such tile: ": lambda file: spoil(
        file, tiles=[ROW | {"mask": "bitmap", "tile": [64, 128, 4, 1]}]
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_cannot_be_used_is_named(what):
    problem = call().problem
    file = written(problem)
    DAMAGED[what](file)
    with pytest.warns(RuntimeWarning, match="the tables' tiles are used") as caught:
        assert backend.plan(problem) == plan_for(problem, INTERPRETER)
    assert str(file) in str(caught[0].message) and what.strip() in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.plan(problem)  # warned of once
    before = file.read_bytes()
    with pytest.raises(ValueError, match="remove it") as error:
        tuning.tune([call()], INTERPRETER, lambda step: pytest.fail("timed too early"))
    assert str(file) in str(error.value)
    with pytest.raises(ValueError, match="remove it"):
        written(problem)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["kernels", "triton"])
def test_another_version_is_not_used_and_is_replaced(name):
    problem = call().problem
    file = written(problem)
    spoil(file, **{name: "0.0.1"})
    with pytest.warns(RuntimeWarning, match=rf"with {name} 0\.0\.1, this is .*; run tilewise tune"):
        assert backend.plan(problem) == plan_for(problem, INTERPRETER)
    written(problem, "dq")
    assert list(tuning.read("interpreter")) == [tile_key("dq", problem)]


def test_where_the_file_is(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(tuning.path("sm_90")) == "/home/someone/.cache/tilewise/tiles-sm_90.json"
    monkeypatch.setattr(tuning.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.warns(RuntimeWarning, match="no home"):
        assert tuning.load("sm_90") == {}


# The command.


def run_command(capsys, *arguments):
    import sys

    from tilewise import cli
    from tilewise.cli import console

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tilewise", "tune", *arguments])
        patch.setattr(console.out, "width", 140)
        with pytest.raises(SystemExit) as end:
            cli.main()
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_the_command_needs_a_gpu(capsys):
    status, _, error = run_command(capsys, "--shape", "1,2,64,16")
    assert status == 2
    assert "tune: it times kernels on a GPU; TRITON_INTERPRET is set" in error


@pytest.fixture
def pretended(monkeypatch):
    """The command on a machine whose GPU is the interpreter, with a clock that knows the tile."""
    from tilewise.bench import machine, timing

    tune = importlib.import_module("tilewise.tune")
    clock = Clock(monkeypatch, Tile(16, 32, 4, 1))
    stock = tune.call_of
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(backend, "load_error", lambda: None)
    monkeypatch.setattr(backend, "unsupported_reasons", lambda problem: [])
    monkeypatch.setattr(backend, "architecture", lambda: INTERPRETER)
    monkeypatch.setattr(machine, "facts", lambda device: {"device": "no GPU"})
    monkeypatch.setattr(timing, "cuda_clock", lambda step, calls: clock(step))
    monkeypatch.setattr(tune, "call_of", lambda case, softcap, _: stock(case, softcap, "cpu"))


def test_the_command_writes_and_shows(capsys, pretended):
    given = ("--shape", "1,1,20,16", "--dtype", "float32", "--mode", "forward", "--budget", "0")
    status, text, _ = run_command(capsys, *given, "--mask", "none", "--softcap", "5")
    assert status == 0
    assert "4 bytes, D 64, mask none, options" in text and "16x32, 4 warps, 1 stages" in text
    problem = replace(call("forward").problem, softcap=5.0)
    assert tuning.read("interpreter") == {tile_key("forward", problem): Tile(16, 32, 4, 1)}
    status, text, _ = run_command(capsys, *given, "--json")
    trials = json.loads(text)["trials"]
    assert status == 0 and [t["mask"] for t in trials if t["best"]] == ["band"]
    assert len(tuning.read("interpreter")) == 2


def test_the_command_names_a_damaged_file(capsys, pretended):
    file = written(call().problem)
    file.write_text("nonsense")
    status, _, error = run_command(
        capsys, "--shape", "1,1,20,16", "--dtype", "float32", "--mode", "forward"
    )
    assert status == 2 and str(file) in error and "remove it" in error
