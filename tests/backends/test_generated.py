"""Every backend on the same generated cases, forward and backward, against float64."""

from __future__ import annotations

import hypothesis
import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.testing import tolerance
from tilewise.testing.cases import FEATURES, MASKS, Case, grid
from tilewise.testing.poison import poisoned
from tilewise.testing.strategies import cases

each_backend = pytest.mark.parametrize("backend", tilewise.dispatch.BACKENDS, indirect=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TILE = 16  # the grid's problems are 37 by 37 and more: several tiles, the last one ragged
GROUPS = ("plain", *(feature.name for feature in FEATURES))


def agrees_with_float64(case: Case, backend: str, tiles: int) -> bool:
    """Assert it, forward and backward; False if the backend says that it does not take the case."""
    call = case.make()
    leaves = {name: x.detach().requires_grad_() for name, x in call.differentiable().items()}
    said = tilewise.explain(**(call.options | leaves), backend="reference")
    if said.reasons[backend]:
        with pytest.raises(tilewise.UnsupportedError):
            tilewise.attention(**(call.options | leaves), backend=backend)
        return False
    with poisoned():
        tolerance.check(call, tilewise.attention, tiles=tiles, backend=backend)
    return True


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
@each_backend
def test_each_option_alone_and_in_pairs(backend, dtype, first, tile_sizes, compared):
    tile_sizes(TILE, TILE)
    group = group_of(dtype, first)
    taken = sum(agrees_with_float64(case, backend, -(-case.kv_len // TILE)) for case in group)
    if not taken:
        pytest.skip(f"{backend} takes none of these {len(group)} cases")
    compared(f"{backend}, {str(dtype)[6:]}, options alone and in pairs", taken)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@each_backend
def test_any_mixture(backend, dtype, tile_sizes, compared):
    count = 0

    @hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(cases(dtypes=(dtype,)))
    def mixture(case):
        nonlocal count
        tile_sizes(32, 48)
        count += agrees_with_float64(case, backend, tiles=3)

    mixture()
    if not count:
        pytest.skip(f"{backend} does not take {dtype}")
    compared(f"{backend}, {str(dtype)[6:]}, drawn mixtures", count)


@pytest.mark.slow
@each_backend
@pytest.mark.parametrize("head_dim", [1, 3, 128, 255, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_head_dims(head_dim, dtype, backend, tile_sizes, compared):
    tile_sizes(64, 64)
    case = Case(1, 4, 2, 129, 127, head_dim, head_dim, dtype=dtype, mask="causal")
    if not agrees_with_float64(case, backend, tiles=2):
        pytest.skip(f"{backend} does not take {dtype}")
    compared(f"{backend}, head_dim 1 to 512", 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@each_backend
def test_batch_entries_that_differ_and_do_not_stand_side_by_side(
    backend, dtype, tile_sizes, compared, monkeypatch
):
    mask = m.lengths(torch.tensor([37, 5, 37, 0]))
    monkeypatch.setitem(MASKS, "far_apart", lambda case, generator: mask)
    tile_sizes(TILE, TILE)
    case = Case(batch=4, dtype=dtype, mask="far_apart", alibi="bh", bias="b11k", dropout_p=0.1)
    if not agrees_with_float64(case, backend, tiles=3):
        pytest.skip(f"{backend} does not take {dtype}")
    compared(f"{backend}, {str(dtype)[6:]}, batch entries that differ", 1)


@pytest.mark.parametrize("length", [1, 17, 127, 128, 129, 300])
@pytest.mark.parametrize("tile", [(64, 64), (128, 32), (1, 300), (37, 41)])
def test_tile_sizes(length, tile, tile_sizes, compared):
    tile_sizes(*tile)
    case = Case(1, 2, 1, length, length + 9, 32, 32, mask="documents", alibi="h", dropout_p=0.2)
    with poisoned():
        tiles = -(-(length + 9) // tile[1])
        tolerance.check(case.make(), tilewise.attention, tiles=tiles, backend="tiled")
    compared("tiled, tile sizes", 1)


LONG = {
    "causal": {"mask": "causal", "alibi": "h"},
    "window": {"mask": "window", "relative_bias": True, "sinks": True},
    "documents": {"mask": "packed_causal", "kv_heads": 1, "dropout_p": 0.2},
    "bitmap": {"mask": "random", "softcap": 2.0},
    "lengths": {"mask": "lengths", "alibi": "bh", "kv_heads": 2},
    "bias": {"bias": "h1k", "mask": "prefix"},
    "strided": {"layout": "transposed", "v_dim": 17},
}


@each_backend
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("lengths", [(130, 300), (257, 128), (1, 400)], ids=str)
def test_several_tiles_of_the_native_size(name, dtype, lengths, backend, tile_sizes, compared):
    """Long enough for several strips, tiles and parts in kernels whose tile size is fixed."""
    tile_sizes(64, 128)
    q_len, kv_len = lengths
    case = Case(batch=1, q_len=q_len, kv_len=kv_len, dtype=dtype, **LONG[name])
    if not agrees_with_float64(case, backend, tiles=-(-kv_len // 128)):
        pytest.skip(f"{backend} does not take this")
    compared(f"{backend}, several tiles", 1)


@each_backend
def test_long_sums_stay_accurate(backend, tile_sizes, compared):
    """Thousands of keys: one running sum in float32 would exceed the bound."""
    tile_sizes(16, 512)
    case = Case(batch=1, q_heads=8, kv_heads=8, q_len=64, kv_len=4096, head_dim=8, v_dim=8)
    if not agrees_with_float64(case, backend, tiles=8):
        pytest.skip(f"{backend} does not take this")
    compared(f"{backend}, 4096 keys", 1)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("extra", [{}, {"scale": 1.0}, {"alibi": torch.full((4,), 0.5)}], ids=str)
def test_the_lowest_float_as_a_bias_hides_but_a_row_of_it_spreads_evenly(backend, dtype, extra):
    """Libraries mask with the lowest float; it must not overflow in a kernel's own units."""
    bias = torch.zeros(1, 1, 70, 70, dtype=dtype)
    bias[..., 35:] = torch.finfo(dtype).min
    bias[..., 60:, :] = torch.finfo(dtype).min
    q, k, v = (torch.randn(1, 4, 70, 16).to(dtype).requires_grad_() for _ in range(3))
    try:
        out = tilewise.attention(q, k, v, bias=bias, backend=backend, **extra)
    except tilewise.UnsupportedError as reason:
        pytest.skip(str(reason))

    def standard(to: torch.dtype) -> torch.Tensor:
        options = {n: x.to(to) if isinstance(x, torch.Tensor) else x for n, x in extra.items()}
        inputs = (x.detach().to(to) for x in (q, k, v))
        return tilewise.standard_attention(*inputs, bias=bias.to(to), **options).double()

    want = standard(torch.float64)
    rounding = torch.finfo(dtype).eps * want.abs().max()
    bound = 2 * (standard(dtype) - want).abs().max() + rounding
    assert (out.double() - want).abs().max() <= bound
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
