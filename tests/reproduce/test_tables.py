from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tilewise.bench import runner
from tilewise.bench.memory import Memory
from tilewise.bench.timing import Settings, Timing
from tilewise.reproduce import attention, published, sizes, tables, training
from tilewise.reproduce.models import GPTWork, Run
from tilewise.reproduce.published import Architecture
from tilewise.reproduce.sizes import CPU, FULL, QUICK, ModelSize

SETTINGS = Settings(least=1, most=1, budget_s=0)


@pytest.fixture(autouse=True)
def one_sample(monkeypatch):
    monkeypatch.setattr(tables, "_LEAST", 1)
    monkeypatch.setattr(tables, "_MOST", 1)


@pytest.fixture
def known_memory(monkeypatch):
    """Memory without child processes: standard is quadratic, the others are linear."""

    def measure(provider, cases, *, device):
        for case in cases:
            numbers = case.kv_len * (case.kv_len if provider == "standard" else 100)
            yield Memory(numbers * 100, "ok", None, "known")

    monkeypatch.setattr(runner, "measure", measure)


def run(name, **options):
    document = tables.run([name], QUICK, **options)
    json.dumps(document, allow_nan=False)
    (result,) = document["results"]
    assert result["name"] == name
    for section in result["sections"]:
        for row in section["rows"]:
            assert set(section["columns"]) - {"published_speedup"} - set(row) <= {
                key for key in section["columns"] if key.startswith("published")
            }
    assert {claim["verdict"] for claim in result["claims"]} <= {"yes", "in part", "no", "not run"}
    return result


@pytest.mark.parametrize("name", ["speed", "gpt", "bert", "lra", "flops"])
def test_every_table_runs_and_reports_its_whole(name):
    told: list[float] = []
    result = run(name, report=lambda _what, share: told.append(share))
    assert sum(told) == pytest.approx(1)
    first = result["sections"][0]["rows"]
    assert all(row["tilewise"] > 0 and row["standard"] > 0 for row in first)
    assert all(row["speedup"] > 0 for row in first)


def test_memory_counts_the_inputs_too(known_memory):
    told: list[float] = []
    result = run("memory", report=lambda _what, share: told.append(share))
    assert sum(told) == pytest.approx(1)
    first, last = result["sections"][0]["rows"]
    inputs = 4 * 1 * 2 * 256 * 32 * 4
    assert last["standard"] == (256 * 256 * 100 + inputs) / 2**20
    assert last["saving"] == (256 * 256 * 100 + inputs) / (256 * 100 * 100 + inputs)
    assert last["tensors"] == (256 * 100 * 100 + inputs) / (inputs / 4)
    assert last["matrices"] == (256 * 256 * 100 + inputs) / (2 * 256 * 256 * 4)
    assert first["published_saving"] == 36 / 22 and first["published_matrices"] == 4 + 10 / 2
    growth = {c["what"][:8]: c["verdict"] for c in result["claims"][-2:]}
    assert growth == {"standard": "yes", "tilewise": "yes"}


def rows_of(standard, ours):
    lengths = (1024, 2048, 4096)
    both = zip(lengths, standard, ours, strict=True)
    return [
        {"length": n, "standard": s, "tilewise": t, "saving": s / t, "tensors": t}
        for n, s, t in both
    ]


def test_memory_claims_are_judged_by_the_numbers():
    good = attention._memory_claims(rows_of((100.0, 400.0, 1600.0), (5.0, 8.0, 13.0)))
    assert [claim.verdict for claim in good] == ["yes", "yes", "yes", "yes", "yes"]
    bad = attention._memory_claims(rows_of((100.0, 110.0, 120.0), (20.0, 80.0, 320.0)))
    assert [claim.verdict for claim in bad] == ["in part", "no", "no", "no", "no"]
    assert bad[-1].here == "4.00×"
    short = attention._memory_claims(rows_of((1.0,) * 3, (1.0,) * 3)[:1])
    assert [claim.verdict for claim in short[:2]] == ["not run", "not run"]
    assert short[-1].verdict == "not run", "one length does not grow"


def test_speed_claims_take_the_least_the_most_and_the_mean():
    claims = attention._speed_claims(
        {"forward": {128: 1.0, 999: 9.0}, "both": {128: 1.5, 256: 6.0}}
    )
    assert [claim.here for claim in claims] == [
        "1.5 to 6×",
        "6×",
        "1×",
        "3×",
        "1.50 to 6.00× (N = 128 to 256)",
    ]
    assert [claim.verdict for claim in claims] == ["in part", "yes", "no", "yes", "no"]
    turned = attention._speed_claims({"forward": {}, "both": {128: 6.0, 4096: 1.5}})
    assert turned[-1].verdict == "yes" and turned[-1].published == "2.16 to 1.68×"
    assert claims[2].published == "2.62×", "of the same lengths alone"
    nothing = attention._speed_claims({"forward": {}, "both": {}})
    assert {claim.verdict for claim in nothing} == {"not run"}


def timed(work, **seconds):
    return work, Run({name: Timing(s, s, s, s, 1, 1) for name, s in seconds.items()})


def gpt(like, context, dtype="bfloat16"):
    return GPTWork(ModelSize(like, Architecture(1, 2, 32, 64), context, 1, dtype))


def test_gpt_claims():
    ended = [
        timed(gpt("GPT-2 small", 64, "float32"), standard=9.0, tilewise=1.0),
        timed(gpt("GPT-2 small", 64), standard=2.0, tilewise=1.0),
        timed(gpt("GPT-3 1.3B", 256), standard=6.0, tilewise=2.0),
        timed(gpt("GPT-3 1.3B", 64), standard=3.0, tilewise=2.0),
        timed(gpt("GPT-3 2.7B", 64), tilewise=2.0),
    ]
    counted = [training._counted("GPT-3 1.3B", 2048), training._counted("GPT-3 1.3B", 8192)]
    found = {claim.what: (claim.here, claim.verdict) for claim in _claims(ended, counted)}
    values = list(found.values())
    assert values[:4] == [("2×", "in part"), ("2×", "yes")] + [("no number", "not run")] * 2
    assert values[4:6] == [("1.5×", "yes"), ("1.50 to 3.00×", "yes")]
    assert values[6:8] == [("no number", "not run"), ("no two numbers", "not run")]
    assert values[8][1] == "yes" and len(values) == 9, "8k has no published tokens/s"
    shrinking = [ended[3][1], ended[2][1]]
    turned = [(ended[2][0], shrinking[0]), (ended[3][0], shrinking[1])]
    assert list(_claims(turned, []))[5].verdict == "no"


def _claims(ended, counted):
    return training._gpt_claims(ended, counted)


def test_counted_flops_that_are_off_are_said_to_be():
    row = training._counted("GPT-3 1.3B", 2048)
    claim = training._gpt_claims([], [row | {"tokens": 2 * row["published_tokens"]}])[-1]
    assert claim.verdict == "no" and "+100.0%" in claim.here


def test_long_range_means_over_the_tasks(monkeypatch):
    gains = {1024: 2.0, 2000: 4.0, 4000: 8.0}
    monkeypatch.setattr(
        training,
        "run",
        lambda work, **_: timed(work, standard=gains[work.size.context], tilewise=1.0)[1],
    )
    result = training.lra(CPU.lra, device="cpu", settings=SETTINGS, report=lambda *_: None)
    assert result.claims[0].here == "4×", "1k and 4k twice, 2k once"
    assert "five tasks" in result.claims[0].what
    assert result.claims[0].verdict == "yes"
    result = training.lra(CPU.lra[:1], device="cpu", settings=SETTINGS, report=lambda *_: None)
    assert result.claims[0].here == "2×" and "lengths run here" in result.claims[0].what


def test_what_has_no_number_says_why(monkeypatch):
    reason = {"standard": "needs at least 99 GiB, 1 GiB are free"}
    monkeypatch.setattr(training, "run", lambda *_, **__: Run({}, reason))
    result = training.bert(QUICK.bert, device="cpu", settings=SETTINGS, report=lambda *_: None)
    assert result.remarks[-1].endswith("standard: " + reason["standard"])
    assert result.sections[0].rows[0]["standard_ms"] is None
    assert result.claims[0].verdict == "not run"


def test_curves_that_fall_are_said_to_fall(monkeypatch):
    size = sizes.CurveSize((64, 128), 128, 64, (64,), ("both",), "float32")
    seconds = {("none", 64): 1.0, ("none", 128): 4.0, ("causal", 64): 1.0, ("causal", 128): 2.0}

    def run_case(case, providers, *, report, **_):
        report("", 2.0 * len(providers))
        s = seconds[case.mask, case.q_len]
        return [
            runner.Cell(case, p.name, timing=Timing(s, s, s, s, 1, 1), memory_note="none")
            for p in providers
        ]

    monkeypatch.setattr(attention, "run_case", run_case)
    result = attention.flops(size, device="cpu", settings=SETTINGS, report=lambda *_: None)
    slower, level, causal = result.claims
    assert (slower.here, slower.verdict) == ("1 to 1×", "no")
    assert (level.verdict, level.published) == ("no", "88 to 171"), "level is not rising"
    assert (causal.here, causal.verdict) == ("2×", "yes")
    rows = result.sections[0].rows
    assert rows[0]["tilewise"] == 3.5 * 4 * 64 * 64 * 64 * 2 / 1.0 / 1e12
    assert rows[2]["tilewise"] == rows[0]["tilewise"] / 2, "causal counts half"


def shrunk(full):
    """The full sizes with every number made tiny: the same dtypes, modes and number of parts."""
    tiny = {"lengths": (64,), "batch": 1, "heads": 1, "dim": 16}
    models = {
        name: tuple(
            replace(
                one,
                architecture=Architecture(1, 2, 32, 64),
                context=one.context // 64,
                batch=1,
            )
            for one in getattr(full, name)
        )
        for name in ("gpt", "bert", "lra")
    }
    curve = replace(full.flops, lengths=(64,), tokens=64, hidden=32, dims=(16, 32))
    return replace(
        full, memory=replace(full.memory, **tiny), speed=replace(full.speed, **tiny), flops=curve,
        **models,
    )  # fmt: skip


def test_the_full_run_is_the_same_code(known_memory):
    document = tables.run([], shrunk(FULL), seconds=0)
    assert [result["name"] for result in document["results"]] == list(tables.TABLES)
    assert document["size"] == "full"
    titles = [section["title"] for section in document["results"][-1]["sections"]]
    assert len(titles) == 6 and titles[-1] == "backward, head_dim 32"
    for result in document["results"]:
        for row in result["sections"][0]["rows"]:
            assert row["saving" if result["name"] == "memory" else "speedup"] > 0


def test_the_published_sizes_are_the_published_sizes():
    assert [one.architecture for one in FULL.gpt[:2]] == [
        published.GPT2_SMALL,
        published.GPT2_MEDIUM,
    ]
    assert {(one.like, one.context) for one in FULL.gpt[2:]} == set(published.GPT3_TFLOPS)
    assert (FULL.speed.batch, FULL.speed.heads, FULL.speed.dim) == (8, 12, 64)
    assert (FULL.memory.batch, FULL.memory.heads, FULL.memory.dim, 2) == published.MEMORY_SHAPE
    assert (FULL.flops.tokens, FULL.flops.hidden) == (16384, 2048)
    assert [one.context for one in FULL.lra] == [1024, 2000, 4000]
    assert all(one.like in training._PUBLISHED for size in (QUICK, CPU, FULL) for one in size.gpt)


def test_sizes_follow_the_device_unless_named():
    assert sizes.choose(None, "cpu") is CPU
    assert sizes.choose(None, "cuda") is FULL
    assert sizes.choose(True, "cpu") is FULL
    assert sizes.choose(False, "cuda") is QUICK


def test_seconds_are_shared_out(monkeypatch):
    given = {}

    def table(name):
        def ended(size, *, settings, **_):
            given[name] = settings.budget_s
            return attention.Result(name, name, name)

        return ended

    monkeypatch.setattr(tables, "TABLES", {name: table(name) for name in tables.TABLES})
    document = tables.run([], QUICK, seconds=100)
    assert sum(given.values()) == pytest.approx(100) and given["memory"] == 0
    assert document["seconds"] == 100
    tables.run(["bert"], QUICK, seconds=100)
    assert given["bert"] == 100
    assert tables.run(["memory"], CPU)["seconds"] == CPU.seconds


@pytest.mark.parametrize(
    "options, message",
    [
        ({"names": ["gpt", "gtp"]}, r"table: got 'gtp', need one of memory, .*, flops"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"seconds": -1.0}, r"seconds: got -1\.0, need a number that is not negative"),
        ({"seconds": float("nan")}, "seconds: got nan"),
    ],
)
def test_bad_input_is_named(options, message):
    names = options.pop("names", ["lra"])
    with pytest.raises(ValueError, match=message):
        tables.run(names, QUICK, **options)


def test_tables_run_in_their_order_whatever_is_asked_first():
    assert tables.choose(["flops", "memory"]) == ["memory", "flops"]
    assert tables.choose([]) == list(tables.TABLES)
