"""The recorded runs compute attention, and move the bytes that the papers' algorithms move."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.frame import Frame
from tilewise.learn.trace import MOST_POSITIONS, example, record
from tilewise.learn.trace_memory import Memory
from tilewise.lowering import lower
from tilewise.testing import oracle
from tilewise.testing.cases import Call, Case
from tilewise.testing.tolerance import largest_error, roundoff, tolerances
from tilewise.tiles import FULL, PARTIAL, SKIP, Bitmap, blocks

NAMES = ("standard", "flash1", "flash2")
FLOAT = 4


def hidden_rows(b, h, q, kv):
    """A predicate under which some queries see no key, and some tiles have no run of keys."""
    return ((q * 7 + kv * 3) % 5 < 2) & (q % 11 != 4) & (kv < 20)


CASES = {
    "none": (32, 32, 8, 8, None),
    "causal": (32, 32, 8, 8, m.causal()),
    "causal, more keys": (13, 30, 5, 7, m.causal()),
    "causal, more queries": (30, 13, 7, 5, m.causal()),
    "causal, start": (9, 20, 4, 6, m.causal(align="start")),
    "window": (32, 32, 8, 8, m.window(5, 2)),
    "prefix or causal": (24, 24, 8, 6, m.prefix(10) | m.causal()),
    "lengths": (16, 33, 8, 8, m.lengths(torch.tensor([17]))),
    "documents": (40, 40, 8, 8, m.documents(torch.arange(40) * 3 // 40) & m.causal()),
    "chunks": (24, 24, 8, 8, m.chunks(6)),
    "dilated": (24, 24, 8, 8, m.dilated(3)),
    "not": (24, 24, 8, 8, ~m.window(3, 3)),
    "predicate": (33, 29, 8, 8, m.from_predicate(hidden_rows)),
    "boolean": (16, 16, 4, 4, torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) < 0.2),
    "nothing": (10, 10, 4, 4, m.prefix(0)),
    "one": (1, 1, 8, 8, None),
    "largest": (64, 64, 8, 8, m.causal()),
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request):
    """(q, k, v, mask, trace) of one case."""
    q_len, kv_len, block_q, block_kv, mask = CASES[request.param]
    q, k, v = example(q_len, kv_len, 8, seed=3)
    return q, k, v, mask, record(q, k, v, mask=mask, block_q=block_q, block_kv=block_kv)


def as_call(q, k, v, mask, **options):
    """The same problem for the oracle, as one batch entry and one head."""
    whole = [x[None, None] for x in (q, k, v)]
    zeros = torch.zeros(1, 1, len(q), v.shape[1]), torch.zeros(1, 1, len(q))
    plain = Case(batch=1, q_heads=1, kv_heads=1, q_len=len(q), kv_len=len(k), head_dim=8)
    options |= {} if mask is None else {"mask": mask}
    return Call(plain, *whole, options, *zeros)


def test_each_run_is_exact_attention(case):
    q, k, v, mask, trace = case
    call = as_call(q, k, v, mask)
    exact = oracle.run(call)
    allowed = tolerances(call, exact, tiles=trace.states.shape[1])
    ours = tilewise.attention(*(x[None, None] for x in (q, k, v)), mask=mask)[0, 0]
    want, lse = exact.tensors["out"][0, 0], exact.tensors["lse"][0, 0]
    for name in NAMES:
        run = trace.run(name)
        assert largest_error(run.out, want) <= allowed["out"], name
        assert largest_error(run.lse, lse) <= allowed["lse"], name
        assert largest_error(run.out, ours) <= 2 * allowed["out"], name
        assert run.error == pytest.approx(largest_error(run.out, want), abs=1e-12)


def test_scale_is_taken():
    q, k, v = example(12, 20, 8, seed=0)
    call = as_call(q, k, v, None, scale=0.9)
    exact = oracle.run(call)
    allowed = tolerances(call, exact, tiles=3)["out"]
    for run in record(q, k, v, scale=0.9, block_q=5).runs:
        assert largest_error(run.out, exact.tensors["out"][0, 0]) <= allowed
        assert run.error <= allowed


def test_tiles_are_those_of_the_lowered_mask(case):
    q, k, _, mask, trace = case
    cpu = torch.device("cpu")
    lowered = lower(mask, Frame.plain(1, 1, len(q), len(k), cpu))
    for i, rows in enumerate(blocks(len(q), trace.block_q)):
        for j, keys in enumerate(blocks(len(k), trace.block_kv)):
            visible = lowered.tile(rows, keys, cpu)
            state = FULL if visible.all() else PARTIAL if visible.any() else SKIP
            assert int(trace.states[i, j]) == state
    if not isinstance(lowered, Bitmap):  # whose table knows tiles of 64 x 64 only
        assert torch.equal(lowered.table(trace.block_q, trace.block_kv)[0, 0], trace.states)
    count = {name: int((trace.states == s).sum()) for s, name in enumerate(trace.tiles)}
    assert trace.tiles == count and list(count) == ["skipped", "partial", "full"]


def test_the_flash_algorithms_visit_live_tiles_only_and_in_their_order(case):
    *_, trace = case
    live = [(i, j) for i, row in enumerate(trace.states.tolist()) for j, s in enumerate(row) if s]
    blocks = (trace.block_q, trace.block_kv)

    def visited(name):
        steps = [s for s in trace.run(name).steps if s.phase == "scores"]
        return [(s.rows[0] // blocks[0], s.keys[0] // blocks[1]) for s in steps]

    assert visited("flash2") == live, "queries outside"
    assert visited("flash1") == sorted(live, key=lambda tile: tile[::-1]), "keys outside"
    assert len(visited("standard")) == trace.states.numel(), "standard attention skips nothing"
    for name in NAMES[1:]:
        skipped = [t[:2] for s in trace.run(name).steps if s.phase == "skip" for t in s.tiles]
        every = {(i, j) for i in range(trace.states.shape[0]) for j in range(trace.states.shape[1])}
        assert sorted(skipped) == sorted(every - set(live))
        assert trace.run(name).visited == len(live)


def sizes(length, block):
    return [min(block, length - start) for start in range(0, length, block)]


def test_hbm_traffic_is_what_the_algorithms_prescribe(case):
    """Counted by hand from the algorithms' lines, tile by tile; the code counts when it copies."""
    q, k, *_, trace = case
    d, e = trace.head_dim, trace.v_dim
    rows, keys = sizes(len(q), trace.block_q), sizes(len(k), trace.block_kv)
    live = trace.states.bool().tolist()
    pairs = [(r, c) for i, r in enumerate(rows) for j, c in enumerate(keys) if live[i][j]]
    everything = len(q) * len(k)

    read = {
        # Q once, K for each block of queries; S back; P back, V for each block of queries.
        "standard": len(q) * d + len(rows) * len(k) * (d + e) + 2 * everything,
        # K and V of a live column once; Q, O, l, m of each live tile.
        "flash1": sum(c * (d + e) for j, c in enumerate(keys) if any(row[j] for row in live))
        + sum(r * (d + e + 2) for r, _ in pairs),
        # Q of a live row once; K and V of each live tile.
        "flash2": sum(r * d for i, r in enumerate(rows) if any(live[i]))
        + sum(c * (d + e) for _, c in pairs),
    }
    written = {
        "standard": 2 * everything + len(q) * e,
        # O, l, m once to begin with and once for each live tile.
        "flash1": len(q) * (e + 2) + sum(r * (e + 2) for r, _ in pairs),
        "flash2": len(q) * (e + 1),
    }
    extra = {"standard": 2 * everything, "flash1": 2 * len(q), "flash2": len(q)}
    for name in NAMES:
        last = trace.run(name).steps[-1]
        assert last.hbm_read == FLOAT * read[name], name
        assert last.hbm_written == FLOAT * written[name], name
        assert last.extra == FLOAT * extra[name], name


def test_sram_is_never_overfull_and_counters_never_fall(case):
    *_, trace = case
    assert trace.sram & (trace.sram - 1) == 0
    for name in NAMES:
        run = trace.run(name)
        assert 0 < run.peak <= trace.sram
        assert max(sum(s.resident.values()) for s in run.steps) <= run.peak
        for counter in ("hbm_read", "hbm_written", "sram_read", "sram_written"):
            counts = [getattr(step, counter) for step in run.steps]
            assert counts == sorted(counts)
        last = run.steps[-1]
        assert last.sram_written >= last.hbm_read, "all that is loaded goes through SRAM"
        assert last.sram_read >= last.hbm_written


def test_sram_traffic_of_one_tile():
    """2 queries and 3 keys of 4 numbers in one tile, counted by hand from _tile_2."""
    q, k, v = example(2, 3, 4, seed=0)
    last = record(q, k, v, block_q=2, block_kv=3).run("flash2").steps[-1]
    # Loads 8 + 12 + 12; first O, l, m 8 + 2 + 2; S, P 6 + 6; m, l, O 2 + 2 + 8; last O, lse 8 + 2.
    assert last.sram_written == FLOAT * (32 + 12 + 12 + 12 + 10)
    # Q, K 8 + 12; S, m, l 6 + 2 + 2; O, S, V 8 + 6 + 12; l, O, m 2 + 8 + 2; stored O, lse 8 + 2.
    assert last.sram_read == FLOAT * (20 + 10 + 26 + 12 + 10)


def test_the_steps_rebuild_the_result(case):
    """What a page plays back: scores, weights, m, l and out, all from the steps' changes alone."""
    q, k, *_, trace = case
    visible = oracle.visibility(as_call(*case[:4]))[0, 0]
    scores = (q.double() @ k.double().T) * trace.head_dim**-0.5
    # A sum of d products, the scale and the product with it: each rounds once.
    terms = (q.double().abs() @ k.double().abs().T) * trace.head_dim**-0.5
    bound = (2 * trace.head_dim + 2) * roundoff(torch.float32) * terms
    for name in NAMES:
        run = trace.run(name)
        held = {
            "scores": torch.full((len(q), len(k)), torch.nan),
            "weights": torch.full((len(q), len(k)), torch.nan),
            "out": torch.full_like(run.out, torch.nan),
            "m": torch.full((len(q),), torch.nan),
            "l": torch.full((len(q),), torch.nan),
        }
        for step in run.steps:
            for change in step.changes:
                if change.name != "rescale":
                    at = (slice(*change.rows),) + ((slice(*change.keys),) if change.keys else ())
                    held[change.name][at] = change.values
        assert torch.equal(held["out"], run.out)
        assert torch.equal(held["m"], run.m) and torch.equal(held["l"], run.l)
        assert not run.m.isnan().any() and not run.l.isnan().any()
        seen = ~held["scores"].isnan()
        assert bool((seen | ~visible).all()), "every visible pair was computed"
        assert bool(torch.isneginf(held["scores"])[seen & ~visible].all())
        error = (held["scores"].double() - scores).abs()[visible]
        assert (error <= bound[visible]).all()
        if name == "standard":
            # Every row with a key sums to one: l sums kv_len weights, and each division rounds.
            sums = held["weights"].double().sum(1)[visible.any(1)]
            assert ((sums - 1).abs() <= (len(k) + 1) * roundoff(torch.float32)).all()


def test_rescaling_is_recorded():
    """Scores that rise with every tile: each later tile shrinks what came before."""
    q = torch.ones(4, 2)
    k = torch.arange(12.0)[:, None].expand(12, 2).contiguous()
    trace = record(q, k, k, scale=0.5, block_q=4, block_kv=4)
    for name in NAMES[1:]:
        steps = [s for s in trace.run(name).steps if s.phase == "softmax"]
        factors = [{c.name: c.values for c in s.changes}["rescale"] for s in steps]
        maxima = [{c.name: c.values for c in s.changes}["m"] for s in steps]
        assert [float(x[0]) for x in maxima] == [3, 7, 11]
        assert torch.equal(factors[0], torch.zeros(4)), "nothing came before"
        for factor in factors[1:]:
            assert torch.allclose(factor, torch.full((4,), -4.0).exp(), rtol=1e-6)
        assert "rises in 4 rows of 4" in steps[1].text and "0.018" in steps[1].text
    falling = record(q, k.flip(0).contiguous(), k, scale=0.5, block_q=4, block_kv=4)
    text = [s.text for s in falling.run("flash2").steps if s.phase == "softmax"]
    assert "m and l start" in text[0]
    assert all("No maximum rises" in line for line in text[1:])


def test_recording_is_repeatable_and_leaves_its_inputs_alone():
    q, k, v = example(16, 16, 8, seed=5)
    kept = [x.clone() for x in (q, k, v)]
    first, second = record(q, k, v), record(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(kept, (q, k, v), strict=True))
    assert torch.equal(first.run("flash2").out, second.run("flash2").out)
    assert not torch.equal(example(16, 16, 8, seed=6)[0], q)


def test_sram_capacity_decides():
    q, k, v = example(32, 32, 8, seed=0)
    need = max(run.peak for run in record(q, k, v).runs)
    assert record(q, k, v, sram=need).sram == need
    with pytest.raises(ValueError, match=f"sram: got {need - 4} bytes, need at least"):
        record(q, k, v, sram=need - 4)
    with pytest.raises(ValueError, match="sram: got 64 bytes, need at least 136 for the softmax"):
        record(q, k, v, sram=64, block_q=2, block_kv=2)


def test_memory_starts_as_nan_and_counts_copies():
    memory = Memory({"q": torch.ones(4, 2)}, capacity=64)
    memory.allocate("out", 4, 2)
    assert memory.hbm["out"].isnan().all()
    memory.load("Q", "q", (0, 2))
    memory.sram["Q"] += 1
    assert torch.equal(memory.hbm["q"], torch.ones(4, 2)), "SRAM holds a copy"
    memory.store("Q", "out", (2, 4))
    assert memory.hbm["out"][:2].isnan().all() and memory.hbm["out"][2:].eq(2).all()
    assert (memory.hbm_read, memory.hbm_written) == (16, 16)
    assert (memory.sram_read, memory.sram_written, memory.resident) == (16, 16, 16)
    with pytest.raises(ValueError, match="need at least 80 to hold Q, K at once"):
        memory.put("K", torch.zeros(16))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(65, 8)}, ValueError, "q_len: got 65, .* largest that fits is 64"),
        ({"q": torch.zeros(0, 8)}, ValueError, "q_len: got 0, need at least 1"),
        ({"q": torch.zeros(8)}, ValueError, r"q: got shape \[8\]"),
        ({"q": torch.zeros(8, 8, dtype=torch.float64)}, TypeError, "q: got torch.float64"),
        ({"q": torch.full((8, 8), torch.nan)}, ValueError, "q: got inf or NaN"),
        ({"k": torch.zeros(8, 4)}, ValueError, "k: got head_dim 4, need q's 8"),
        ({"v": torch.zeros(9, 8)}, ValueError, "v: got kv_len 9, need k's 8"),
        ({"v": torch.zeros(8, 33)}, ValueError, "v_dim: got 33, .* largest that fits is 32"),
        ({"block_q": 0}, ValueError, "block_q: got 0"),
        ({"sram": 0}, ValueError, "sram: got 0 bytes"),
        ({"mask": m.lengths(torch.tensor([3, 4]))}, ValueError, "mask: lengths was given 2"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    q, k, v = (change.pop(name, torch.zeros(8, 8)) for name in "qkv")
    with pytest.raises(error, match=message):
        record(q, k, v, **change)


def test_too_many_tiles_offers_the_smallest_block_that_fits():
    q, k, v = example(64, 40, 4, seed=0)
    with pytest.raises(ValueError, match=r"block_q: got 3, .* 22 tiles, .* that fits is 4"):
        record(q, k, v, block_q=3)
    with pytest.raises(ValueError, match=r"block_kv: got 2, .* 20 tiles, .* that fits is 3"):
        record(q, k, v, block_kv=2)
    record(q, k, v, block_q=4, block_kv=3)


@pytest.mark.parametrize("name", ["q_len", "kv_len", "head_dim"])
def test_an_example_too_large_to_draw_names_its_size(name):
    size = {"q_len": 8, "kv_len": 8, "head_dim": 8, name: 4096}
    with pytest.raises(ValueError, match=f"{name}: got 4096, .* the largest that fits is"):
        example(*size.values(), seed=0)
    assert MOST_POSITIONS == 64


def test_flash_attention_1_holds_the_answer_for_the_keys_so_far():
    """Line 12 divides at every visit: out is exact for the keys seen. And records do not change."""
    q, k, v = example(24, 30, 8, seed=4)
    run = record(q, k, v, mask=m.causal(), block_q=8, block_kv=7).run("flash1")
    start = {c.name: c.values for c in run.steps[0].changes}
    assert start["out"].eq(0).all() and start["l"].eq(0).all() and torch.isneginf(start["m"]).all()
    exact, visits = {}, 0
    for step in run.steps:
        if step.phase != "accumulate":
            continue
        stop = step.keys[1]
        if stop not in exact:
            call = as_call(q, k, v, m.causal() & m.prefix(stop))
            found = oracle.run(call)
            exact[stop] = found.tensors["out"][0, 0], tolerances(call, found, tiles=5)["out"]
        want, allowed = exact[stop]
        rows = slice(*step.rows)
        (change,) = (c for c in step.changes if c.name == "out")
        assert largest_error(change.values, want[rows]) <= allowed
        visits += 1
    assert visits == run.visited > 10
