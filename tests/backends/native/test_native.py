"""The native backend's own matters: instruction sets, threads, forks, hostile descriptions."""

from __future__ import annotations

import concurrent.futures
import ctypes
import itertools
import multiprocessing

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.backends import native
from tilewise.backends.native import library
from tilewise.backends.native.call import MOST_LAYOUTS, Call, describe
from tilewise.problem import Inputs, Problem
from tilewise.testing import tolerance
from tilewise.testing.cases import LAYOUTS, Case, grid, in_layout
from tilewise.testing.poison import poisoned
from tilewise.tiles import Band, Ranges

pytestmark = pytest.mark.skipif(library.load_error() is not None, reason=str(library.load_error()))
ISAS = () if library.load_error() else library.isas()
ALL_ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx", "amx_fma")


@pytest.fixture
def isa(request, monkeypatch):
    if request.param not in ISAS:
        pytest.skip(f"this processor cannot run {request.param}")
    monkeypatch.setenv("TILEWISE_FORCE_ISA", request.param)
    tilewise.dispatch.choose.cache_clear()
    yield request.param
    tilewise.dispatch.choose.cache_clear()


each_isa = pytest.mark.parametrize("isa", ALL_ISAS, indirect=True)


@pytest.mark.slow
@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_each_isa_passes_the_generated_cases(isa, dtype, compared):
    count = 0
    with poisoned():
        for _, case in grid(dtype):
            tolerance.check(case.make(), tilewise.attention, tiles=1, backend="native")
            assert library.last_isa() == isa
            count += 1
    compared(f"native on {isa}, {str(dtype)[6:]}", count)


@each_isa
def test_the_forced_isa_runs(isa):
    q, k, v = (torch.randn(1, 2, 200, 24, requires_grad=True) for _ in range(3))
    said = tilewise.explain(q, k, v)
    assert said.backend == "native" and said.plan.block_q == library.strip_rows()
    out = tilewise.attention(q, k, v, mask=m.causal())
    assert library.last_isa() == isa
    want = tilewise.standard_attention(q, k, v, mask=m.causal())
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "neon"])
def test_an_unknown_isa_is_an_error(name, monkeypatch):
    monkeypatch.setenv("TILEWISE_FORCE_ISA", name)
    q = torch.randn(1, 2, 20, 8)
    with pytest.raises(
        ValueError, match=rf"^TILEWISE_FORCE_ISA: got '{name}'; this processor can run"
    ):
        tilewise.attention(q, q, q, backend="native")


CASES = {
    "causal": Case(batch=1, q_heads=2, kv_heads=1, q_len=700, kv_len=700, mask="causal"),
    "one head": Case(batch=1, q_heads=1, kv_heads=1, q_len=300, kv_len=900, relative_bias=True),
    "shared bias": Case(q_len=200, kv_len=300, bias="qk", dropout_p=0.2),
    "documents": Case(q_len=260, kv_len=260, mask="documents", alibi="h", sinks=True),
    "keyless bias": Case(q_len=130, kv_len=400, bias="bhq1", softcap=2.0, dtype=torch.bfloat16),
    "few queries": Case(batch=1, kv_heads=2, q_len=3, kv_len=2500, sinks=True, relative_bias=True),
    "odd pairs": Case(q_heads=3, kv_heads=3, q_len=7, kv_len=1333, head_dim=33, v_dim=31,
                      mask="padded_causal", dtype=torch.bfloat16),
}  # fmt: skip


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"sinks": True},
        {"mask": "window"},
        {"mask": "lengths"},
        {"mask": "nothing"},
        {"mask": "random", "sinks": True},
        {"kv_len": 3072, "relative_bias": True, "alibi": "h", "softcap": 3.0},
        {"kv_len": 1025, "dropout_p": 0.3, "bias": "bhqk"},
        {"head_dim": 33, "v_dim": 31, "magnitude": 12.0},
    ],
    ids=lambda options: " ".join(options),
)
def test_keys_split_into_runs(isa, dtype, options):
    """Few queries over many keys: the keys are cut into runs that are merged by their sums."""
    case = Case(
        **{"batch": 1, "q_len": 2, "kv_len": 2111, "kv_heads": 2, "dtype": dtype, **options}
    )
    with poisoned():
        tolerance.check(case.make(), tilewise.attention, tiles=17, backend="native")
    assert library.last_isa() == isa


@each_isa
def test_a_long_cache_that_is_hardly_filled(isa):
    """Whole runs lie beyond the length, and hold NaN there; pages are read where they lie."""
    lengths = torch.tensor([5, 1500, 2300])
    q, k, v = torch.randn(3, 2, 1, 24), torch.randn(3, 1, 2400, 24), torch.randn(3, 1, 2400, 24)
    shown = m.lengths(lengths)
    want = tilewise.attention(*(x.double() for x in (q, k, v)), mask=shown, backend="reference")
    for x in (k, v):
        x.masked_fill_(torch.arange(2400)[:, None] >= lengths.view(3, 1, 1, 1), torch.nan)
    got = tilewise.decode(q, k, v, lengths=lengths, backend="native")
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)
    table = torch.randperm(3 * 100, dtype=torch.int32).view(3, 100)
    pages = [torch.empty(300, 24, 1, 24) for _ in "kv"]
    for x, page in zip((k, v), pages, strict=True):
        page[table.long()] = x.view(3, 100, 24, 1, 24)
    paged = tilewise.decode(q, *pages, lengths=lengths, page_table=table, backend="native")
    assert torch.equal(paged, got)


@each_isa
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_with_any_number_of_threads(name, isa):
    call = CASES[name].make()
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(tolerance.run(call, tilewise.attention, backend="native"))
    for later in runs[1:]:
        for key, value in runs[0].items():
            assert torch.equal(value, later[key]), key


def test_several_python_threads_at_once():
    calls = [Case(q_len=n, kv_len=n, mask="causal", seed=n).make() for n in range(60, 220, 20)]
    want = [tolerance.run(call, tilewise.attention, backend="native") for call in calls]
    torch.set_num_threads(2)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(tolerance.run, call, tilewise.attention, backend="native")
            for call in calls * 5
        ]
        got = [future.result() for future in futures]
    for a, b in zip(want * 5, got, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_threads_and_family_are_read_by_every_call(monkeypatch):
    """Neither is part of a call's template."""
    seen, run = [], library.run
    monkeypatch.setattr(library, "run", lambda *args: (seen.append(args[1].threads), run(*args))[1])
    q = torch.randn(1, 2, 9, 8)
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        tilewise.attention(q, q, q, backend="native")
    assert seen == [1, 2, 1]
    for name in (*ISAS, *reversed(ISAS)):
        monkeypatch.setenv("TILEWISE_FORCE_ISA", name)
        tilewise.attention(q, q, q, backend="native")
        assert library.last_isa() == name


def test_a_template_for_each_layout():
    """Strides and dtypes find the template; what differs between calls of one layout is set."""
    shape = (2, 4, 5, 8)
    ways = {layout: in_layout(torch.randn(shape), layout) for layout in LAYOUTS}
    plan = tilewise.explain(*[torch.randn(shape)] * 3, backend="native").plan
    plan.templates.clear()
    for mixed in itertools.product(LAYOUTS, repeat=3):
        for _ in range(2):
            q, k, v = (torch.randn_like(ways[layout]) for layout in mixed)
            q, k, v = (in_layout(x, layout) for x, layout in zip((q, k, v), mixed, strict=True))
            out = tilewise.attention(q, k, v, backend="native")
            want = tilewise.attention(*(x.contiguous() for x in (q, k, v)), backend="native")
            assert torch.equal(out, want)
        assert len(plan.templates) <= MOST_LAYOUTS
    assert len(plan.templates) > 1
    found = tilewise.explain(*[torch.randn(shape)] * 3, backend="native").plan
    assert found is plan and "templates" not in repr(plan)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
def test_gradients_are_laid_out_as_their_inputs(layout):
    q, k, v = (in_layout(torch.randn(2, 4, 5, 8), layout).requires_grad_() for _ in range(3))
    out = tilewise.attention(q, k, v, backend="native")
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.stride() == x.stride()


def test_another_default_device_changes_nothing():
    q, k, v = (torch.randn(1, 2, 33, 8, requires_grad=True) for _ in range(3))
    options = {"bias": torch.randn(33, 1), "alibi": torch.rand(2), "sinks": torch.randn(2)}
    options = {n: x.requires_grad_() for n, x in options.items()}
    leaves = (q, k, v, *options.values())
    want = tilewise.attention(q, k, v, **options, backend="native")
    grads = torch.autograd.grad(want.sum(), leaves)
    with torch.device("meta"):
        out = tilewise.attention(q, k, v, **options, backend="native")
        found = torch.autograd.grad(out.sum(), leaves)
    assert torch.equal(out, want)
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))


def _child(queue, q, want):
    # Only the kernel runs here: after a fork, PyTorch's own parallel operations may wait forever.
    out = tilewise.attention(q, q, q, backend="native")
    queue.put(bool((out.numpy() == want.numpy()).all()))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes(method):
    """After a fork the threads of the parent's pool are gone: waiting for them would never end."""
    torch.set_num_threads(2)
    q = torch.randn(2, 2, 300, 16)
    want = tilewise.attention(q, q, q, backend="native")
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, q, want))
    child.start()
    assert queue.get(timeout=60) is True
    child.join(timeout=60)
    assert child.exitcode == 0


def description():
    """A valid forward call, to be spoiled."""
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    inputs = Inputs(q, k, v, Band.everything(9, 9))
    return described(inputs)


def described(inputs: Inputs) -> tuple[Call, list[object]]:
    """A call with its output, the first of what has to live as long."""
    problem = Problem.of(inputs, scale=1.0)
    out, lse = torch.empty(1, 2, 9, 8), torch.empty(1, 2, 9)
    call, alive = describe(native.plan(problem), problem, inputs, out, lse)
    return call, [out, lse, inputs, alive]


SPOILED = {
    "batch": 0,
    "kv_heads": 3,
    "q_len": -1,
    "kv_len": 2**40,
    "head_dim": 0,
    "lse": None,
    "mask_kind": 7,
    "keep_factor": 0.5,
    "threads": 0,
    "page_table": 8,  # without pages
}


@pytest.mark.parametrize("field", SPOILED)
def test_the_library_refuses_what_cannot_be(field):
    call, alive = description()
    library.run("forward", call)
    setattr(call, field, SPOILED[field])
    with pytest.raises(library.LibraryError, match=r"^native forward: "):
        library.run("forward", call)
    del alive


def test_runs_beyond_the_keys_are_cut_not_followed():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    wild = Ranges(
        9,
        9,
        torch.full((1, 1, 9, 1), -(2**31), dtype=torch.int32),
        torch.full((1, 1, 9, 1), 2**31 - 1, dtype=torch.int32),
    )
    inputs = Inputs(q, k, v, wild)
    call, alive = described(inputs)
    library.run("forward", call)
    torch.testing.assert_close(alive[0], tilewise.standard_attention(q, k, v, scale=1.0))


def test_the_library_refuses_missing_tensors_and_names():
    call, alive = description()
    with pytest.raises(library.LibraryError, match=r"gradient is missing"):
        library.run("backward", call)
    call.k.dtype = 9
    with pytest.raises(library.LibraryError, match=r"q, k, v or out is missing"):
        library.run("forward", call)
    loaded = library.load()
    assert loaded.tilewise_forward(None, b"baseline") != 0
    assert loaded.tilewise_forward(ctypes.byref(call), None) != 0
    call.k.dtype = 0
    assert loaded.tilewise_forward(ctypes.byref(call), b"mmx") != 0
    assert loaded.tilewise_error() == b"no kernels of that name were compiled in"
    del alive


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Offsets are 64-bit: q, k and v are the end of a tensor of 2**31 elements and more."""
    heads, length, dim = 2, 64, 16
    whole = torch.empty(2**31 + heads * length * dim, dtype=torch.float16)
    view = whole[-heads * length * dim :].view(1, heads, length, dim).normal_()
    start = whole.numel() - 2**30 - length * dim
    far = whole.as_strided((1, heads, length, dim), (0, 2**30, dim, 1), start)
    far.copy_(view)
    want = tilewise.attention(view, view, view, backend="tiled")
    out = tilewise.attention(far, far, far, backend="native")
    torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)
