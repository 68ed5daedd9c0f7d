"""The backward kernels against float64 in the interpreter: every gradient of every option."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.backends.triton import backward_pass, dkdv
from tilewise.testing import tolerance
from tilewise.testing.cases import FEATURES, Case, grid
from tilewise.testing.poison import poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 16
GROUPS = ("plain", *(feature.name for feature in FEATURES))
INF, NAN = torch.inf, torch.nan


def halved(case: Case) -> Case:
    """The case with two query heads instead of four, and as many to a kv head."""
    return replace(case, q_heads=2, kv_heads=max(1, case.kv_heads // 2))


CASES = {dtype: {name: halved(case) for name, case in grid(dtype)} for dtype in DTYPES}
SINGLE = [name for name in CASES[torch.float32] if "+" not in name]
PAIRS = {
    name: replace(CASES[DTYPES[i % 3]][name], batch=1)
    for i, name in enumerate(name for name in CASES[torch.float32] if "+" in name)
}


def check(case: Case, tiles: int) -> None:
    """Assert that outputs and gradients are within the derived bounds; memory was NaN before."""
    with poisoned():
        tolerance.check(case.make(), tilewise.attention, tiles=tiles, backend="triton")


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize(
    "dtype, size",
    [
        pytest.param(torch.float32, 16, id="float32"),
        pytest.param(torch.bfloat16, 32, id="bfloat16"),
        pytest.param(torch.float16, 32, id="float16", marks=pytest.mark.slow),
    ],
)
def test_each_option_alone(name, dtype, size, tiles, compared):
    tiles(size, size)
    case = CASES[dtype][name]
    check(case, -(-case.kv_len // size))
    compared(f"triton backward, {str(dtype)[6:]}, options alone", 1)


@pytest.mark.slow
@pytest.mark.parametrize("first", GROUPS)
def test_options_in_pairs(first, tiles, compared):
    """Each pair in one dtype, the dtypes taking turns: to interpret them all takes too long."""
    tiles(32, 32)
    pairs = [case for name, case in PAIRS.items() if name.startswith(f"{first}+")]
    for case in pairs:
        check(case, tiles=2)
    if pairs:
        compared("triton backward, options in pairs", len(pairs))


EVERYTHING = {
    "alibi": "bh",
    "softcap": 3.0,
    "relative_bias": True,
    "sinks": True,
    "dropout_p": 0.2,
    "kv_heads": 1,
}


@pytest.mark.parametrize("bias", ["bhqk", "qk", "b11k", "bhq1"])
@pytest.mark.parametrize("mask", [None, "causal", "sinks_window", "packed_causal", "random"])
def test_all_options_together(mask, bias, tiles, compared):
    tiles(32, 16)
    check(Case(q_heads=2, mask=mask, bias=bias, v_dim=9, **EVERYTHING), tiles=3)
    compared("triton backward, all options together", 1)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive(scale, tiles, compared):
    tiles(TILE, TILE)
    check(Case(batch=1, q_heads=1, kv_heads=1, mask="causal", scale=scale), tiles=3)
    compared("triton backward, scales", 1)


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (16, 16), (32, 128)], ids=str)
@pytest.mark.parametrize(
    "mask",
    ["causal", "window", "not_causal", "sinks_window", "documents", "padded_causal", "random"],
)
def test_several_tiles(mask, size, tiles, compared):
    """Long enough for skipped, partial and full tiles, tiles of both orientations, ragged ends."""
    size = (size[0], min(size[1], 64)) if mask == "random" else size
    tiles(*size)
    case = Case(1, 1, 1, 110, 130, 16, 16, mask=mask)
    check(case, -(-130 // size[1]))
    compared("triton backward, several tiles", 1)


@pytest.mark.parametrize("dim, v_dim", [(1, 3), (80, 48), (24, 128), (256, 16)])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
def test_dimensions(dim, v_dim, dtype, tiles, compared):
    tiles(32, 32)
    check(Case(1, 2, 1, 40, 45, dim, v_dim, dtype=dtype, mask="causal"), tiles=2)
    compared("triton backward, dimensions", 1)


@pytest.mark.parametrize("mask", [None, "causal", "random"])
@pytest.mark.parametrize("options", [{}, {"bias": "hqk", "alibi": "h", "dropout_p": 0.2}])
def test_large_dimensions_take_a_launch_for_each_of_dk_and_dv(mask, options, tiles, monkeypatch):
    tiles(32, 32)
    turns, seen = dkdv.turns, []
    monkeypatch.setattr(
        dkdv, "turns", lambda *call: [seen.append(turn) or turn for turn in turns(*call)]
    )
    check(Case(1, 2, 1, 40, 45, 272, 16, dtype=torch.float16, mask=mask, **options), tiles=2)
    assert [(d_k is None, d_v is None) for d_k, d_v, _ in seen] == [(True, False), (False, True)]


@pytest.mark.parametrize("mask", ["causal", "random"])
@pytest.mark.parametrize("size", [(32, 32), (16, 32), (32, 16)], ids=str)
def test_float32_with_options_goes_by_steps_of_columns(size, mask, tiles):
    """In tiles of every orientation."""
    tiles(*size)
    options = {"bias": "hqk", "alibi": "h", "softcap": 5.0, "dropout_p": 0.2}
    check(Case(1, 2, 1, 40, 45, 72, 80, mask=mask, **options), tiles=-(-45 // size[1]))


# Packed sequences, whose rows stand elsewhere than their index says.


@pytest.mark.parametrize("dim, v_dim", [(24, 40), (72, 80)])
@pytest.mark.parametrize("mask", ["causal", "random"])
def test_narrow_steps_where_there_are_no_matrix_instructions(mask, dim, v_dim, tiles, monkeypatch):
    """As Turing's kernels take them."""
    tiles(16, 16)
    asked = []
    monkeypatch.setattr(
        backward_pass, "multiplies_matrices", lambda name: asked.append(name) or False
    )
    for options in ({}, {"bias": "hqk", "relative_bias": True, "softcap": 5.0}):
        case = Case(1, 2, 1, 40, 45, dim, v_dim, dtype=torch.float16, mask=mask, **options)
        check(case, tiles=3)
    assert asked and set(asked) == {"interpreter"}


@pytest.mark.parametrize("options", [("alibi", "relative_bias"), ("bias", "dropout", "sinks")])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_packed_sequences_are_their_parts(mask, options, tiles):
    """Gradients of a packed call are those of its sequences, one by one, in float64."""
    tiles(TILE, TILE)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    lengths = [(21, 9), (0, 4), (3, 30), (17, 0), (1, 1), (30, 24)]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0) for n in zip(*lengths, strict=True))
    total_q, total_k, heads = int(cu_q[-1]), int(cu_k[-1]), 2
    x = {"q": draw(total_q, heads, 8), "k": draw(total_k, 1, 8), "v": draw(total_k, 1, 8)}
    if "alibi" in options:
        x["alibi"] = draw(len(lengths), heads)
    if "relative_bias" in options:
        x["relative_bias"] = draw(heads, 30 + 30 - 1)
    if "bias" in options:
        x["bias"] = draw(total_q, total_k)
    if "sinks" in options:
        x["sinks"] = draw(heads)
    rest = {"mask": m.causal() if mask else None}
    if "dropout" in options:
        rest |= {"dropout_p": 0.3, "seed": 5}

    def gradients(x: dict[str, torch.Tensor], backend: str) -> list[torch.Tensor]:
        qkv = [x[n] for n in "qkv"]
        named = {n: t for n, t in x.items() if n not in "qkv"}
        out, lse = tilewise.attention_varlen(
            *qkv, cu_q, cu_k, return_lse=True, backend=backend, **named, **rest
        )
        loss = (out * factors.to(out.dtype)).sum() + lse.nan_to_num(neginf=0).sum()
        return torch.autograd.grad(loss, list(x.values()))

    factors = torch.randn(total_q, heads, 8, generator=generator)
    exact = {n: t.detach().double().requires_grad_() for n, t in x.items()}
    want = gradients(exact, "reference")
    with poisoned():
        got = gradients(x, "triton")
    standard = gradients(x, "reference")
    for name, a, b, c in zip(x, got, want, standard, strict=True):
        # Twice what standard attention errs in float32, and 64 roundings of the largest entry.
        error, theirs = float((a - b).abs().max()), float((c - b).abs().max())
        assert error <= 2 * theirs + 64 * 2**-24 * float(b.abs().max()), name


# What is hidden stays hidden.

WIDE = {
    "band": lambda: m.window(12, 3),
    "runs": lambda: m.causal() & m.lengths(torch.tensor([60])),
    "two runs": lambda: (m.prefix(2) | m.window(30, 0)) & m.causal(),
    "bitmap": lambda: m.from_predicate(lambda b, h, q, kv: (kv <= q) & ((q + kv) % 3 != 1)),
}


@pytest.mark.parametrize("what", [NAN, INF, -INF])
@pytest.mark.parametrize("form", WIDE)
@pytest.mark.parametrize("where", ["q", "k", "v", "d_out"])
def test_nothing_leaks_from_a_hidden_pair(what, form, where, tiles):
    """An entry that is no number spoils what it is seen by or sees, and changes nothing else."""
    tiles(32, 32)
    check_that_nothing_leaks(what, form, where, 8)


@pytest.mark.parametrize("form", ["band", "bitmap"])
@pytest.mark.parametrize("where", ["q", "d_out"])
def test_nothing_leaks_where_dk_and_dv_have_a_launch_each(form, where, tiles):
    tiles(32, 32)
    check_that_nothing_leaks(INF, form, where, 272)


def check_that_nothing_leaks(what: float, form: str, where: str, dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    n, spoiled = 70, 40
    x = {name: torch.randn(1, 1, n, dim, generator=generator) for name in ("q", "k", "v", "d_out")}
    if dim > 128:  # which float32 does not take
        x = {name: each.half() for name, each in x.items()}
    mask = WIDE[form]()
    frame = tilewise.frame.Frame.plain(1, 1, n, n, torch.device("cpu"))
    visible = mask.contains(frame.entries(0, n)).expand(1, 1, n, n)[0, 0]

    def gradients(x: dict[str, torch.Tensor], mask: tilewise.masks.Mask) -> list[torch.Tensor]:
        leaves = [x[name].clone().requires_grad_() for name in "qkv"]
        out = tilewise.attention(*leaves, mask=mask, backend="triton")
        return torch.autograd.grad(out, leaves, x["d_out"])

    clean = gradients(x, mask)
    x[where][0, 0, spoiled, 5] = what
    with poisoned():
        dirty = gradients(x, mask)
    rows = torch.zeros(n, dtype=torch.bool)
    if where in ("q", "d_out"):
        rows[spoiled] = True
    else:
        rows = visible[:, spoiled].clone()
    keys = visible[rows].any(0)
    assert 0 < int(rows.sum()) < n and 0 < int(keys.sum()) < n
    for name, a, b in zip("qkv", dirty, clean, strict=True):
        spared = ~(rows if name == "q" else keys)
        error = (a - b)[0, 0, spared].abs().max()
        # The careful way adds in tiles of another size.
        rounding = 64 * 2**-24 if b.dtype == torch.float32 else torch.finfo(b.dtype).eps
        assert error <= rounding * b.abs().max(), name
    if where == "d_out":
        assert not dirty[2][0, 0, keys, 5].isfinite().any(), "what is seen shows"
        assert dirty[2][0, 0, keys, :5].isfinite().all()
    else:
        assert dirty[0][0, 0, rows].isnan().any()


def test_infinite_gradients_keep_their_sign(tiles):
    """dV of an infinite dO is as a plain product makes it."""
    tiles(16, 16)
    q, k, v, d_out = (torch.randn(1, 1, 40, 8) for _ in range(4))
    d_out[0, 0, 20, 1], d_out[0, 0, 20, 2], d_out[0, 0, 21, 2] = INF, -INF, INF
    v.requires_grad_()
    got = torch.autograd.grad(
        tilewise.attention(q, k, v, mask=m.causal(), backend="triton"), v, d_out
    )[0][0, 0]
    assert (got[:21, 1] == INF).all() and got[21:, 1].isfinite().all()
    assert got[:21, 2].isnan().all() and got[21, 2] == INF and got[22:, 2].isfinite().all()
    assert got[:, 3:].isfinite().all() and got[:, 0].isfinite().all()


def test_rows_that_see_nothing(tiles):
    tiles(16, 16)
    x = [torch.randn(2, 2, 37, 8, requires_grad=True) for _ in range(3)]
    mask = m.lengths(torch.tensor([0, 20])) & m.window(1, 0, align="start")
    with poisoned():
        out, lse = tilewise.attention(*x, mask=mask, return_lse=True, backend="triton")
        d_lse = torch.randn_like(lse)  # even where lse is -inf
        grads = torch.autograd.grad((out, lse), x, (torch.randn_like(out), d_lse))
    assert all((g[0] == 0).all() and g.isfinite().all() for g in grads)
    assert (grads[0][1, :, 22:] == 0).all() and (grads[1][1, :, 20:] == 0).all()
    assert all(bool((g[1] != 0).any()) for g in grads)


# What is asked for.


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "alibi", "relative_bias", "sinks"])
@pytest.mark.parametrize("bias", ["qk", "h1k", "bhq1"])
def test_one_gradient_alone(wanted, bias, tiles):
    """It is the one that comes with all others, bit for bit."""
    if bias != "qk" and wanted not in ("q", "k", "bias"):
        pytest.skip("the shape of the bias makes no difference to this one")
    tiles(32, 32)
    call = Case(1, 2, 1, mask="causal", bias=bias, alibi="h", relative_bias=True, sinks=True).make()
    everything = tolerance.run(call, tilewise.attention, backend="triton")[f"d_{wanted}"]
    leaves = call.differentiable()
    leaves[wanted] = leaves[wanted].detach().requires_grad_()
    options = {name: leaves.get(name, value) for name, value in call.options.items()}
    out, lse = tilewise.attention(
        leaves["q"], leaves["k"], leaves["v"], return_lse=True, backend="triton", **options
    )
    got = torch.autograd.grad((out, lse), leaves[wanted], (call.d_out, call.d_lse))[0]
    assert torch.equal(got, everything)


def test_lse_without_a_gradient(tiles):
    """Where nothing was made of lse, its gradient counts as zero."""
    tiles(32, 32)
    q, k, v, d_out = (torch.randn(1, 1, 40, 8) for _ in range(4))
    q.requires_grad_()
    alone = tilewise.attention(q, k, v, mask=m.causal(), backend="triton")
    out, lse = tilewise.attention(q, k, v, mask=m.causal(), backend="triton", return_lse=True)
    got = torch.autograd.grad(alone, q, d_out)[0]
    both = torch.autograd.grad((out, lse), q, (d_out, torch.zeros_like(lse)))[0]
    assert torch.equal(got, both)


def test_more_programs_than_a_grid_axis_of_65535(tiles, monkeypatch):
    """Of 70,000 batch entries every kernel's programs lie on the first axis, which is long."""
    from tilewise.backends.triton import launch

    tiles(16, 16)
    grids: dict[str, tuple[int, ...]] = {}

    def record(kernel: Any, grid: tuple[int, ...], *rest: object) -> None:
        grids[kernel.__name__] = grid

    monkeypatch.setattr(launch, "run", record)
    q = torch.zeros(70_000, 1, 1, 1).requires_grad_()
    table, bias = torch.zeros(1, 1).requires_grad_(), torch.zeros(70_000, 1, 2, 2).requires_grad_()
    mask = m.lengths(torch.ones(70_000, dtype=torch.int32))
    out = tilewise.attention(q, q, q, relative_bias=table, mask=mask, backend="triton")
    torch.autograd.grad(out.sum(), (q, table))
    x = q.expand(70_000, 1, 2, 1)
    torch.autograd.grad(tilewise.attention(x, x, x, bias=bias, backend="triton").sum(), bias)
    assert all(grid[1:] in ((), (1,), (1, 1)) for grid in grids.values())
    many = ("prepare_kernel", "dkdv_kernel", "dq_kernel", "bound_runs", "segment_runs")
    assert all(grids[name][0] == 70_000 for name in (*many, "d_bias_kernel"))
    assert 1 < grids["d_relative_kernel"][0] <= 512
