"""The forward kernels, whole rows and in parts, against float64 in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.backends import triton as backend
from tilewise.testing import oracle, tolerance
from tilewise.testing.cases import FEATURES, Call, Case, grid
from tilewise.testing.poison import poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_way = pytest.mark.parametrize("parts", [0, 1, 3], ids=["whole", "packed", "parts"])
TILE = 16
GROUPS = ("plain", *(feature.name for feature in FEATURES))
SINGLE = [name for name, _ in grid() if "+" not in name]
CASES = {dtype: dict(grid(dtype)) for dtype in DTYPES}
PAIRS = {
    name: replace(CASES[DTYPES[i % 3]][name], batch=1)
    for i, name in enumerate(name for name in CASES[torch.float32] if "+" in name)
}


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` and ``lse`` of the kernels, in memory that was NaN before."""
    with torch.no_grad(), poisoned():
        return tilewise.attention(
            call.q, call.k, call.v, **call.options, backend="triton", return_lse=True
        )


def check(case: Case, tiles: int) -> None:
    """Assert that ``out`` and ``lse`` are within the derived bounds."""
    call = case.make()
    exact = oracle.run(call)
    allowed = tolerance.tolerances(call, exact, tiles)
    for name, got in zip(("out", "lse"), attend(call), strict=True):
        error = tolerance.largest_error(got, exact.tensors[name])
        assert error <= allowed[name], f"{case}: {name} is off by {error:.3g} > {allowed[name]:.3g}"


@each_dtype
@pytest.mark.parametrize("name", SINGLE)
def test_each_option_alone(name, dtype, tiles, compared):
    tiles(TILE, TILE)
    check(CASES[dtype][name], tiles=4)
    compared(f"triton forward, {str(dtype)[6:]}, options alone", 1)


@pytest.mark.parametrize("parts", [1, 3], ids=["packed", "parts"])
@pytest.mark.parametrize("name", SINGLE)
def test_each_option_alone_with_packed_heads(name, parts, tiles, compared):
    tiles(TILE, TILE, parts)
    dtype = torch.bfloat16 if parts == 3 else torch.float32
    check(replace(CASES[dtype][name], kv_heads=2), tiles=4)
    compared("triton forward, packed heads, options alone", 1)


@pytest.mark.slow
@pytest.mark.parametrize("first", GROUPS)
def test_options_in_pairs_with_packed_heads(first, tiles, compared):
    """The kernel that decodes, each pair in one dtype. Those of ``test_backward_pass`` run the
    other forward kernel."""
    pairs = [
        (i, case) for i, (name, case) in enumerate(PAIRS.items()) if name.startswith(f"{first}+")
    ]
    for i, case in pairs:
        tiles(32, 32, 1 + i % 2)
        check(replace(case, kv_heads=min(case.kv_heads, 2)), tiles=2)
    if pairs:
        compared("triton forward, packed heads, options in pairs", len(pairs))


RICH = {
    "bias": "h1k",
    "alibi": "bh",
    "softcap": 3.0,
    "relative_bias": True,
    "sinks": True,
    "dropout_p": 0.2,
}


@each_way
@pytest.mark.parametrize("mask", [None, "causal", "sinks_window", "packed_causal", "random"])
def test_all_options_together(mask, parts, tiles, compared):
    tiles(TILE, TILE, parts)
    check(Case(kv_heads=2, q_len=29, kv_len=50, mask=mask, **RICH), tiles=4)
    compared("triton forward, all options together", 1)


@pytest.mark.parametrize("scale", [0.0, -1.0])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_a_scale_that_is_not_positive(scale, mask, tiles, compared):
    tiles(TILE, TILE)
    check(Case(scale=scale, mask=mask), tiles=3)
    compared("triton forward, scales that are not positive", 1)


@pytest.mark.parametrize("block_q, block_kv", [(16, 64), (64, 16), (32, 128), (128, 32)])
@pytest.mark.parametrize("mask", ["causal", "window", "sinks_window", "documents", "random"])
def test_tile_sizes(block_q, block_kv, mask, tiles, compared):
    if mask == "random":
        block_kv = min(block_kv, 64)
    tiles(block_q, block_kv)
    check(Case(1, 2, 2, 130, 201, mask=mask), tiles=-(-201 // block_kv))
    compared("triton forward, tile sizes", 1)


@pytest.mark.parametrize("head_dim, v_dim", [(1, 1), (80, 48), (128, 128), (24, 256), (512, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dimensions(head_dim, v_dim, dtype, compared):
    case = Case(1, 2, 1, 40, 50, head_dim, v_dim, dtype=dtype, mask="causal")
    call = case.make()
    if dtype == torch.float32 and max(head_dim, v_dim) > 128:
        with pytest.raises(tilewise.UnsupportedError, match=r"in torch\.float32 it takes at most"):
            attend(call)
        return
    check(case, tiles=2)
    compared("triton forward, dimensions", 1)


# What is not a number.


def spoilt(what: float, where: str, mask: m.Mask, **options: object) -> Call:
    """Keys 5 and 40 of the first kv head spoilt, in ``where``."""
    call = Case(1, 4, 2, 48, 48, 16, 16, **options).make()
    for name in where:
        x = getattr(call, name)
        x[0, 0, 5] = what
        x[0, 0, 40, 3] = -what
    return replace(call, options=call.options | {"mask": mask})


@each_way
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize(
    "mask",
    [m.causal(), m.window(6, 3), m.prefix(3) | m.window(2, 2), m.dilated(3)],
    ids=["causal", "window", "two_runs", "bitmap"],
)
def test_nothing_leaks_from_a_hidden_key(what, where, mask, parts, tiles):
    tiles(TILE, 2 * TILE, parts)
    call = spoilt(what, where, mask)
    x = {name: t.double() for name, t in call.differentiable().items()}
    want, want_lse, _, _ = oracle.forward(call, x)
    out, lse = attend(call)
    seen = oracle.visibility(call)[0, 0]
    clean = ~(seen[:, 5] | seen[:, 40])
    assert clean.any() and not clean.all(), "the test sees both kinds of rows"
    assert torch.isfinite(out[0, :, clean]).all() and torch.isfinite(lse[0, :, clean]).all()
    torch.testing.assert_close(out[0, :, clean].double(), want[0, :, clean], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(out[0, 2:]).all(), "the other kv head"
    if where == "v":
        spoils = seen[:, 5]
        assert not torch.isfinite(out[0, :2, spoils]).any()
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5, equal_nan=True)


@each_way
def test_rows_that_see_nothing(parts, tiles):
    tiles(TILE, TILE, parts)
    call = Case(kv_heads=2, mask="nothing").make()
    out, lse = attend(call)
    assert (out == 0).all() and torch.isneginf(lse).all()
    sinks = torch.randn(4)
    out, lse = attend(replace(call, options=call.options | {"sinks": sinks}))
    assert (out == 0).all()
    torch.testing.assert_close(lse, sinks.view(1, -1, 1).expand_as(lse))


def test_hidden_bias_may_be_anything(tiles):
    tiles(TILE, TILE)
    call = Case(q_len=20, kv_len=20).make()
    bias = torch.randn(20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), torch.nan)
    out, _ = attend(replace(call, options={"mask": m.causal(), "bias": bias}))
    want = tilewise.attention(
        call.q, call.k, call.v, mask=m.causal(), bias=bias.nan_to_num(0.0), backend="tiled"
    )
    torch.testing.assert_close(out, want)


def test_more_programs_than_a_grid_axis_of_65535(tiles):
    tiles(TILE, TILE)
    q = torch.randn(1, 1, 16, 16).expand(1, 2, 16, 16)
    launched = []

    def record(kernel, grid, *rest):
        launched.append(grid)

    from tilewise.backends.triton import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", record)
        long = torch.empty(1, 1, 16 * 70_000, 16)
        tilewise.attention(long, q[:, :1], q[:, :1], backend="triton")
    assert launched == [(70_000,)], "the long axis is the first"


# The rest of the protocol.


def test_layout_of_the_output(tiles):
    tiles(TILE, TILE)
    call = Case(layout="bshd").make()
    out, _ = attend(call)
    assert out.transpose(1, 2).is_contiguous()


def test_what_it_does_not_take():
    def reasons(q, v=None):
        v = q if v is None else v
        return tilewise.explain(q, q, v, backend="reference").reasons["triton"]

    assert reasons(torch.zeros(1, 1, 4, 4)) == []
    assert "float64" in reasons(torch.zeros(1, 1, 4, 4, dtype=torch.float64))[0]
    assert "head_dim is 513" in reasons(torch.zeros(1, 1, 4, 513, dtype=torch.float16))[0]
    half = torch.zeros(1, 1, 4, 4, dtype=torch.float16)
    assert "v_dim is 600" in reasons(half, torch.zeros(1, 1, 4, 600, dtype=torch.float16))[0]
    assert "device is meta" in reasons(torch.zeros(1, 1, 4, 4, device="meta"))[0]


def test_a_failing_launch_names_kernel_and_tile(tiles, monkeypatch):
    from tilewise.backends.triton import forward_pass

    class Broken:
        __name__ = "forward_kernel"

        def __getitem__(self, grid):
            def launch(*arguments, **named):
                raise ValueError("no")

            return launch

    tiles(TILE, TILE)
    monkeypatch.setattr(forward_pass, "forward_kernel", Broken())
    call = Case().make()
    with pytest.raises(RuntimeError, match=r"forward_kernel failed on interpreter.*BLOCK_Q=16"):
        attend(call)


def test_names_of_architectures():
    names = {(7, 5): "sm_75", (8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89"}
    names |= {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120"}
    for capability, name in names.items():
        assert backend.architecture_name(*capability) == name
