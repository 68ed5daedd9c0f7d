"""The fused backward against float64 in the interpreter, and when the split form runs instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from tilewise import dispatch
from tilewise import masks as m
from tilewise.problem import Plan, Problem
from tilewise.testing import tolerance
from tilewise.testing.cases import Case, grid
from tilewise.testing.poison import poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = torch.inf, torch.nan
SWITCH = torch.are_deterministic_algorithms_enabled
LEFT_TO_SPLIT = ("alibi", "alibi:bh", "bias:bhq1", "bias:1")
"""Options, as the grid names them, whose gradients are sums along rows."""


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Make the backend take the fused form in tiles of the given size; returns the list of kernels
    launched from then on."""
    from tilewise.backends import triton as backend
    from tilewise.backends.triton import launch
    from tilewise.backends.triton.plan import INTERPRETER, Tile, plan_for

    kernels: list[str] = []
    stock = launch.run

    def run(kernel: Any, *rest: Any) -> None:
        kernels.append(kernel.__name__)
        stock(kernel, *rest)

    monkeypatch.setattr(launch, "run", run)
    # Poisoned memory comes from PyTorch's deterministic mode, in which the fused form steps aside.
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)

    def use(block_q: int, block_kv: int) -> list[str]:
        tile = Tile(block_q, block_kv, 4, 1)

        def plan(problem: Problem) -> Plan:
            chosen = plan_for(problem, INTERPRETER, fused=True)
            assert chosen.fused is not None
            small = {"block_q": 32, "block_kv": 32, "forward": Tile(32, 32, 4, 1)}
            return replace(chosen, fused=tile, dkdv=tile, dq=tile, parts=0, **small)

        monkeypatch.setattr(backend, "plan", plan)
        dispatch.choose.cache_clear()
        return kernels

    yield use
    dispatch.choose.cache_clear()


def check(case: Case, tiles: int) -> None:
    """Assert that outputs and gradients are within the derived bounds; memory was NaN before."""
    with poisoned():
        tolerance.check(case.make(), tilewise.attention, tiles=tiles, backend="triton")


def halved(case: Case) -> Case:
    """The case with two query heads instead of four, and as many to a kv head."""
    return replace(case, q_heads=2, kv_heads=max(1, case.kv_heads // 2))


CASES = {dtype: {name: halved(case) for name, case in grid(dtype)} for dtype in DTYPES}
SINGLE = [n for n in CASES[torch.float32] if "+" not in n and n not in LEFT_TO_SPLIT]


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32"),
        pytest.param(torch.bfloat16, id="bfloat16"),
        pytest.param(torch.float16, id="float16", marks=pytest.mark.slow),
    ],
)
def test_each_option_alone(name, dtype, fused, compared):
    kernels = fused(32, 32)
    case = CASES[dtype][name]
    check(case, -(-case.kv_len // 32))
    compared(f"triton fused backward, {str(dtype)[6:]}, options alone", 1)
    assert "fused_kernel" in kernels and not {"dkdv_kernel", "dq_kernel"} & set(kernels)


EVERYTHING = {"softcap": 3.0, "relative_bias": True, "sinks": True, "dropout_p": 0.2, "kv_heads": 1}


@pytest.mark.parametrize("bias", ["bhqk", "b11k"])
@pytest.mark.parametrize("mask", [None, "sinks_window", "packed_causal", "random"])
def test_all_options_together(mask, bias, fused, compared):
    kernels = fused(32, 16)
    check(Case(q_heads=2, mask=mask, bias=bias, v_dim=9, **EVERYTHING), tiles=3)
    compared("triton fused backward, all options together", 1)
    assert "fused_kernel" in kernels


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (64, 64)], ids=str)
@pytest.mark.parametrize("mask", [None, "causal", "sinks_window", "documents", "random"])
def test_several_tiles(mask, size, fused, compared):
    """Skipped, partial and full tiles, ragged ends, and each way to compute ``dS K``."""
    fused(*size)
    case = Case(1, 2, 1, 110, 130, 16, 16, mask=mask)
    check(case, -(-130 // size[1]))
    compared("triton fused backward, several tiles", 1)


@pytest.mark.parametrize("dim, v_dim", [(1, 3), (80, 48), (24, 128), (256, 16)])
def test_dimensions(dim, v_dim, fused, compared):
    fused(16, 32)
    check(Case(1, 2, 1, 40, 45, dim, v_dim, dtype=torch.bfloat16, mask="causal"), tiles=2)
    compared("triton fused backward, dimensions", 1)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive(scale, fused):
    fused(32, 32)
    check(Case(batch=1, q_heads=1, kv_heads=1, mask="causal", scale=scale), tiles=2)


def gradients(x: dict[str, torch.Tensor], mask: m.Mask | None) -> list[torch.Tensor]:
    leaves = [x[name].clone().requires_grad_() for name in "qkv"]
    out = tilewise.attention(*leaves, mask=mask, backend="triton")
    return list(torch.autograd.grad(out, leaves, x["d_out"]))


def both_forms(
    x: dict[str, torch.Tensor], mask: m.Mask | None, kernels: list[str]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients by the fused form and by the split one, from poisoned memory."""
    with poisoned():
        got = gradients(x, mask)
        assert "fused_kernel" in kernels and "dq_kernel" not in kernels
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
            want = gradients(x, mask)
    assert "dq_kernel" in kernels
    return got, want


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """The same entries are finite, and apart by 64 roundings of the largest at most: the forms add
    in another order."""
    for name, a, b in zip("qkv", got, want, strict=True):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), name
        a, b = a[finite], b[finite]
        assert a.numel() == 0 or (a - b).abs().max() <= 64 * 2**-24 * b.abs().max(), name


WIDE = {
    "band": lambda: m.window(12, 3),
    "two runs": lambda: (m.prefix(2) | m.window(30, 0)) & m.causal(),
    "bitmap": lambda: m.from_predicate(lambda b, h, q, kv: (kv <= q) & ((q + kv) % 3 != 1)),
}


@pytest.mark.parametrize(
    "what, form", [(NAN, "band"), (INF, "band"), (INF, "two runs"), (NAN, "bitmap")]
)
@pytest.mark.parametrize("where", ["q", "k", "v", "d_out"])
def test_nothing_leaks_from_a_hidden_pair(what, form, where, fused):
    """An entry that is no number spoils what it spoils in the split form, which has its own test;
    and all else is what it is without it."""
    kernels = fused(32, 32)
    generator = torch.Generator().manual_seed(3)
    n, spoiled = 50, 40
    x = {name: torch.randn(1, 1, n, 8, generator=generator) for name in ("q", "k", "v", "d_out")}
    x[where][0, 0, spoiled, 5] = what
    got, want = both_forms(x, WIDE[form](), kernels)
    assert any(not g.isfinite().all() for g in got), "what is seen shows"
    assert all(g.isfinite().any() for g in got), "and no more than that"
    assert_close(got, want)


def test_infinite_gradients_keep_their_sign(fused):
    """dV of an infinite dO is as a plain product makes it."""
    fused(16, 16)
    x = {name: torch.randn(1, 1, 40, 8) for name in ("q", "k", "v", "d_out")}
    x["d_out"][0, 0, 20, 1] = -INF
    got = gradients(x, m.causal())[2][0, 0]
    assert (got[:21, 1] == -INF).all() and got[21:, 1].isfinite().all()


@pytest.mark.parametrize("mask", [None, m.window(40, 40)], ids=["none", "band"])
def test_weights_of_keys_beyond_the_end_may_overflow(mask, fused):
    """All scores lie near -200, so a key that is not there (score 0) would weigh exp(200)."""
    kernels = fused(32, 32)
    x = {name: torch.randn(1, 1, 40, 8) for name in ("q", "k", "v", "d_out")}
    x["q"], x["k"] = x["q"] * 0.01 + 10, x["k"] * 0.01 - 7
    got, want = both_forms(x, mask, kernels)
    assert got[0].isfinite().all()
    # dQ is a difference of terms as large as |k| max|dS|, which cancel: the bound is on those.
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 64 * 2**-24 * 10 * 40


def test_rows_that_see_nothing(fused):
    fused(16, 16)
    x = [torch.randn(2, 2, 37, 8, requires_grad=True) for _ in range(3)]
    mask = m.lengths(torch.tensor([0, 20])) & m.window(1, 0, align="start")
    with poisoned():
        out, lse = tilewise.attention(*x, mask=mask, return_lse=True, backend="triton")
        d_lse = torch.randn_like(lse)  # even where lse is -inf
        grads = torch.autograd.grad((out, lse), x, (torch.randn_like(out), d_lse))
    assert all((g[0] == 0).all() and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("mask", [None, "causal"])
def test_packed_sequences_are_their_parts(mask, fused):
    """Gradients of a packed call with grouped heads against float64."""
    kernels = fused(16, 16)
    lengths = [(21, 9), (0, 4), (3, 30), (17, 0), (1, 1), (30, 24)]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0) for n in zip(*lengths, strict=True))
    sizes = ((int(cu_q[-1]), 2, 8), (int(cu_k[-1]), 1, 8), (int(cu_k[-1]), 1, 8))
    x = [torch.randn(size).requires_grad_() for size in sizes]
    relative = torch.randn(2, 30 + 30 - 1).requires_grad_()
    d_out = torch.randn(sizes[0])

    def run(dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, ...]:
        leaves = [y.detach().to(dtype).requires_grad_() for y in (*x, relative)]
        out = tilewise.attention_varlen(
            *leaves[:3], cu_q, cu_k, relative_bias=leaves[3], dropout_p=0.3, seed=5,
            mask=m.causal() if mask else None, backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(out, leaves, d_out.to(dtype))

    want, standard = run(torch.float64, "reference"), run(torch.float32, "reference")
    with poisoned():
        got = run(torch.float32, "triton")
    assert "fused_kernel" in kernels
    for a, b, c in zip(got, want, standard, strict=True):
        # Twice what standard attention errs in float32, and 64 roundings of the largest entry.
        error, theirs = float((a - b).abs().max()), float((c - b).abs().max())
        assert error <= 2 * theirs + 64 * 2**-24 * float(b.abs().max())


# When it runs.


def kernels_of(
    kernels: list[str], wanted: Sequence[str] = "qkv", n: int = 20, **options: Any
) -> set[str]:
    """The kernels of a backward pass with gradients of ``wanted``."""
    x = {name: torch.randn(1, 2, n, 8) for name in "qkv"} | options
    leaves = {name: x[name].requires_grad_() for name in wanted}
    out = tilewise.attention(x["q"], x["k"], x["v"], backend="triton", **options)
    kernels.clear()
    torch.autograd.grad(out.sum(), list(leaves.values()))
    return set(kernels) - {"prepare_kernel"}


PROBLEM = Problem(
    batch=1,
    q_heads=2,
    kv_heads=1,
    q_len=64,
    kv_len=64,
    head_dim=8,
    v_dim=8,
    dtype=torch.float32,
    device="cpu",
    mask="band",
    scale=0.1,
)
SPLIT = {"dkdv_kernel", "dq_kernel"}
FUSED = {"fused_kernel", "round_kernel"}


def test_deterministic_algorithms_take_the_split_form(fused, monkeypatch):
    kernels = fused(32, 32)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", SWITCH)
    assert kernels_of(kernels) == FUSED
    torch.use_deterministic_algorithms(True)
    try:
        assert kernels_of(kernels) == SPLIT
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernels_of(kernels) == FUSED


def test_what_is_left_to_the_split_form(fused):
    kernels = fused(32, 32)
    assert kernels_of(kernels, "kv") == {"dkdv_kernel"}
    assert kernels_of(kernels, "q") == {"dq_kernel"}
    assert kernels_of(kernels, "qv") == FUSED
    assert kernels_of(kernels, mask=m.causal()) == {*FUSED, "careful_kernel"}
    slopes = {"alibi": torch.ones(2)}
    assert kernels_of(kernels, **slopes) == FUSED, "slopes without a gradient"
    slopes["alibi"].requires_grad_()
    assert kernels_of(kernels, ("q", "k", "v", "alibi"), **slopes) == SPLIT
    for shape, found in (((20, 1), SPLIT), ((1, 20), FUSED), ((20, 20), {*FUSED, "d_bias_kernel"})):
        bias = torch.zeros(shape).requires_grad_()
        assert kernels_of(kernels, ("q", "k", "v", "bias"), bias=bias) == found, shape
    assert kernels_of(kernels, n=0) == set(), "nothing to launch"


@pytest.mark.parametrize(
    "asked, fused", [(None, False), ("", False), ("split", False), ("fused", True)]
)
def test_the_variable_chooses(asked, fused, monkeypatch):
    from tilewise.backends import triton as backend

    if asked is None:
        monkeypatch.delenv("TILEWISE_TRITON_BACKWARD", raising=False)
    else:
        monkeypatch.setenv("TILEWISE_TRITON_BACKWARD", asked)
    assert (backend.plan(PROBLEM).fused is not None) == fused


def test_a_value_that_cannot_be_had_is_an_error(monkeypatch):
    from tilewise.backends import triton as backend
    from tilewise.backends.triton.plan import FAMILIES, FUSED, asks_for_fused

    monkeypatch.setenv("TILEWISE_TRITON_BACKWARD", "fast")
    with pytest.raises(ValueError, match="TILEWISE_TRITON_BACKWARD: got 'fast'; it must be split"):
        backend.plan(PROBLEM)
    takes = {name for name, family in FAMILIES.items() if family in FUSED}
    assert takes == {"sm_90", "sm_100", "interpreter"}
    for name in FAMILIES:
        if name in takes:
            assert asks_for_fused("fused", name)
        else:
            with pytest.raises(ValueError, match=rf"on {name}; it needs one of sm_90, sm_100"):
                asks_for_fused("fused", name)
        assert not asks_for_fused("split", name)


@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
def test_plans(name):
    from tilewise.backends.triton.plan import FUSED, Architecture, plan_for
    from tilewise.backends.triton.retry import smaller_plan

    architecture = Architecture(name, 132, 2**25)
    half = replace(PROBLEM, dtype=torch.float16, head_dim=128, v_dim=64)

    def tile(problem: Problem) -> object:
        return plan_for(problem, architecture, fused=True).fused

    family = {"sm_90": "hopper", "sm_100": "blackwell"}[name]
    plain, rich = FUSED[family][2, 128]
    assert plan_for(half, architecture).fused is None
    assert tile(half) == plain and tile(replace(half, softcap=2.0)) == rich
    assert tile(replace(half, head_dim=129)) is None, "no such tile"
    assert tile(replace(half, dtype=torch.float32, head_dim=64)) is None
    assert tile(replace(half, mask="bitmap")) is None
    narrow = tile(replace(half, mask="bitmap", head_dim=64))
    assert narrow == replace(FUSED[family][2, 64][0], block_kv=64)
    whole = plan_for(half, architecture, fused=True)
    steps = [whole]
    while (smaller := smaller_plan(steps[-1])) is not None:
        steps.append(smaller)
    sizes = [(step.fused.stages, step.fused.block_q * step.fused.block_kv) for step in steps]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == (1, 256)
    assert all(step.fused is None for step in (smaller_plan(replace(whole, fused=None)),))


# What the launch and the interpreter make of a descriptor.


def test_the_key_of_a_descriptor():
    """Its dtype and block are compiled in, its address and shape are not."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from tilewise.backends.triton import launch

    def key(x: torch.Tensor, block: list[int]) -> list[Any]:
        found: list[Any] = []
        launch._add(found, TensorDescriptor.from_tensor(x, block))
        return found

    one = key(torch.zeros(64, 16), [32, 16])
    assert one == key(torch.zeros(96, 16), [32, 16]) and hash(tuple(one)) is not None
    assert one != key(torch.zeros(64, 16), [16, 16])
    assert one != key(torch.zeros(64, 16, dtype=torch.float16), [32, 16])


def test_the_interpreter_adds_to_a_descriptor():
    """Programs add to the same place, which is no race; outside of the tensor nothing is added."""
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    from tilewise.backends.triton import interpreter

    interpreter.repair()

    @triton.jit
    def add(x, row, VALUE: tl.constexpr):
        x.atomic_add([row, 0], tl.full((16, 16), VALUE, tl.float32) + tl.program_id(0))

    @triton.jit
    def largest(x):
        x.atomic_max([0, 0], tl.full((16, 16), 1, tl.int32))

    x = torch.zeros(24, 16)
    add[(3,)](TensorDescriptor.from_tensor(x, [16, 16]), 16, 1.0)
    assert (x[16:] == 1 + 2 + 3).all() and (x[:16] == 0).all()
    add[(1,)](TensorDescriptor.from_tensor(x[8:16], [16, 16]), 0, 1.0)
    assert (x[8:16] == 1).all() and (x[16:] == 6).all()
    wide = TensorDescriptor(x, [32, 16], [16, 1], [16, 16])  # eight rows more than there are
    with pytest.raises(Exception, match="outside of the tensor arguments"):
        add[(1,)](wide, 16, 1.0)
    with pytest.raises(Exception, match="not modelled"):
        largest[(1,)](TensorDescriptor.from_tensor(x.int(), [16, 16]))
