"""The AMX kernels on emulated tile registers: whether they are right, on any AVX512-BF16 machine.

A build of the library with ``TILEWISE_EMULATE_AMX`` takes the place of the installed one. Shapes
are chosen to fill tiles (multiples of 32 along the inner dimension) and to leave rests. That
library counts the products of tile registers, which tells whether they ran.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import tilewise
from tilewise import masks as m
from tilewise.backends.native import library
from tilewise.testing import tolerance
from tilewise.testing.cases import Call, Case, grid
from tilewise.testing.poison import poisoned

ROOT = Path(__file__).parents[3]
LACKING = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}"),
    pytest.mark.skipif(
        library.load_error() is not None or "avx512_bf16" not in library.cpu_features(),
        reason="the emulation needs AVX512-BF16",
    ),
]

TILED = {
    "full": {},
    "causal": {"mask": "causal"},
    "rest of rows": {"q_len": 145, "kv_len": 290},
    "rest of keys": {"q_len": 70, "kv_len": 333, "mask": "padded_causal"},
    "wide": {"head_dim": 128, "v_dim": 96, "q_len": 64},
    "narrow rest": {"head_dim": 48, "v_dim": 80},
    "grouped": {"q_heads": 6, "kv_heads": 2, "q_len": 33, "mask": "window"},
    "options": {"softcap": 5.0, "alibi": "h", "sinks": True, "dropout_p": 0.2, "bias": "hqk"},
    "split": {"batch": 1, "q_heads": 20, "kv_heads": 1, "q_len": 2, "kv_len": 2200},
}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with tile registers that are arrays."""
    build = tmp_path_factory.mktemp("amx")
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DTILEWISE_EMULATE_AMX=ON"]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        subprocess.run(command, check=True, capture_output=True)
    return build / "libtilewise.so"


@pytest.fixture
def amx(emulated: Path, monkeypatch: pytest.MonkeyPatch):
    """Send every native call to the emulated AMX kernels; gives the library."""
    monkeypatch.setenv("TILEWISE_LIBRARY", str(emulated))
    monkeypatch.setenv("TILEWISE_FORCE_ISA", "amx")
    loaded = library._open(str(emulated))
    functions = {"forward": loaded.tilewise_forward, "backward": loaded.tilewise_backward}
    monkeypatch.setattr(
        library,
        "_kernels",
        lambda forced: (functions, library._choose_isa(forced, loaded).encode()),
    )
    loaded.tilewise_emulated_products.restype = ctypes.c_int64
    loaded.tilewise_emulated_products()
    return loaded


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPLIT = (torch.float16, torch.float32)
PRODUCTS = {torch.bfloat16: 1, torch.float16: 3, torch.float32: 6}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_split_dtype = pytest.mark.parametrize("dtype", SPLIT, ids=str)


def filled(dtype: torch.dtype, **fields) -> Case:
    shape = {"q_len": 160, "kv_len": 288, "head_dim": 64, "v_dim": 64}
    return Case(**{"dtype": dtype, **shape, **fields})


def attend(call: Call, isa: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setenv("TILEWISE_FORCE_ISA", isa)
    found = tolerance.run(call, tilewise.attention, backend="native")
    monkeypatch.setenv("TILEWISE_FORCE_ISA", "amx")
    return found


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    pairs = [(torch.nan_to_num(a[name], 7.0), torch.nan_to_num(b[name], 7.0)) for name in a]
    return a.keys() == b.keys() and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", TILED)
@each_dtype
def test_shapes_that_fill_tiles(amx, dtype, name):
    with poisoned():
        call = filled(dtype, **TILED[name]).make()
        tolerance.check(call, tilewise.attention, tiles=3, backend="native")
    assert amx.tilewise_last_isa() == b"amx"
    assert amx.tilewise_emulated_products() > 0


@each_dtype
def test_the_generated_cases(amx, dtype, compared):
    count = 0
    with poisoned():
        for name, case in grid(dtype):
            tolerance.check(case.make(), tilewise.attention, tiles=1, backend="native")
            products = amx.tilewise_emulated_products()
            rows = case.q_heads // case.kv_heads * case.q_len
            if rows >= 16 and case.mask != "nothing":
                assert products > 0, name
            elif dtype in SPLIT:  # bfloat16 with few rows may have tiles full of keys
                assert products == 0, name
            count += 1
    assert amx.tilewise_last_isa() == b"amx"
    compared(f"native on amx (emulated), {str(dtype)[6:]}", count)


@each_dtype
def test_how_many_tiles_are_multiplied(amx, dtype):
    """One strip of 48 queries by one tile of 128 keys, both dimensions 64."""
    case = Case(
        batch=1, q_heads=1, kv_heads=1, q_len=48, kv_len=128, head_dim=64, v_dim=64, dtype=dtype
    )
    call = case.make()
    tilewise.attention(call.q, call.k, call.v, backend="native")
    scores, weighted = 8 * 3 * 2, 3 * 4 * 4
    assert amx.tilewise_emulated_products() == PRODUCTS[dtype] * (scores + weighted)
    tolerance.run(call, tilewise.attention, backend="native")
    forward = scores + weighted
    by_queries = 8 * 4 * 2  # 48 queries are 24 pairs, and filled up to 32
    backward = 2 * scores + 2 * by_queries + weighted
    assert amx.tilewise_emulated_products() == PRODUCTS[dtype] * (forward + backward)


@each_dtype
def test_the_same_bits_with_any_number_of_threads(amx, dtype):
    call = Case(q_len=200, kv_len=320, head_dim=64, mask="causal", dtype=dtype).make()
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(tolerance.run(call, tilewise.attention, backend="native"))
    for later in runs[1:]:
        assert same_bits(runs[0], later)


@each_split_dtype
def test_the_switch_to_multiply_adds(amx, dtype, monkeypatch):
    call = filled(dtype, mask="causal").make()
    plain = attend(call, "amx_fma", monkeypatch)
    assert amx.tilewise_last_isa() == b"amx_fma"
    assert amx.tilewise_emulated_products() == 0
    assert same_bits(plain, attend(call, "avx512_bf16", monkeypatch))
    assert not same_bits(plain, attend(call, "amx", monkeypatch))
    call = filled(torch.bfloat16).make()
    assert same_bits(attend(call, "amx", monkeypatch), attend(call, "amx_fma", monkeypatch))
    amx.tilewise_emulated_products()
    attend(call, "amx_fma", monkeypatch)
    assert amx.tilewise_emulated_products() > 0


@pytest.mark.parametrize("name", ["amx_float32", "amx-fma", "AMX"])
def test_a_family_that_is_not_there_is_an_error(amx, monkeypatch, name):
    monkeypatch.setenv("TILEWISE_FORCE_ISA", name)
    q = torch.randn(1, 1, 32, 32)
    with pytest.raises(
        ValueError, match=rf"^TILEWISE_FORCE_ISA: got '{name}'; .* can run amx, amx_fma, "
    ):
        tilewise.attention(q, q, q, backend="native")


SHAPES = {"short": (2, 16, 128, 64), "long": (1, 2, 2048, 64), "wide": (1, 4, 512, 128)}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@each_split_dtype
def test_the_error_is_at_most_that_of_sdpa(amx, dtype, shape, causal):
    """Largest in float32; the root of the mean square in float16, where one rounding of the result
    is as large as any error before it."""
    batch, heads, length, dim = SHAPES[shape]
    mask = "causal" if causal else None
    call = Case(batch=batch, q_heads=heads, kv_heads=heads, q_len=length, kv_len=length,
                head_dim=dim, v_dim=dim, mask=mask, dtype=dtype).make()  # fmt: skip
    x = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]

    def results(inputs, attention):
        out = attention(*inputs)
        return [out, *torch.autograd.grad(out, inputs, call.d_out.to(out.dtype))]

    def sdpa(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    def error(found):
        apart = [(a.double() - b).detach() for a, b in zip(found, want, strict=True)]
        if dtype == torch.float32:
            return [float(d.abs().max()) for d in apart]
        return [float(d.square().mean().sqrt()) for d in apart]

    want = results([t.detach().double().requires_grad_() for t in x], sdpa)
    options = {"mask": m.causal()} if causal else {}
    ours = error(results(x, lambda *qkv: tilewise.attention(*qkv, backend="native", **options)))
    theirs = error(results(x, sdpa))
    assert amx.tilewise_emulated_products() > 0
    assert all(a <= b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_a_float16_number_is_two_parts(amx):
    """A query with one key has its value as output: all finite numbers, the subnormal ones too."""
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    numbers = words.view(torch.float16)
    v = numbers[torch.isfinite(numbers)].view(1, 124, 1, 512)
    q = torch.ones(1, 124, 16, 16, dtype=torch.float16)
    out = tilewise.attention(q, q[:, :, :1], v, backend="native")
    assert amx.tilewise_emulated_products() > 0
    assert torch.equal(out, v.expand_as(out))


def test_a_float32_number_is_three_parts(amx):
    """The same with random bits, between 2^-102 and 2^30 beside a number of ordinary size."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 40, 1, 512)
    significand = torch.randint(1 << 23, shape, generator=generator, dtype=torch.int32)
    exponent = torch.randint(127 - 102, 127 + 30, shape, generator=generator, dtype=torch.int32)
    exponent[..., 0] = 127
    v = (significand | exponent << 23).view(torch.float32)
    v *= torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    q = torch.ones(1, 40, 16, 16)
    out = tilewise.attention(q, q[:, :, :1], v, backend="native")
    assert amx.tilewise_emulated_products() > 0
    assert torch.equal(out, v.expand_as(out))


def changed(dtype: torch.dtype, where: str, value: float, **fields) -> Call:
    """A call with one row of q, k, v or d_out, or one number of d_lse or bias, set to a value."""
    call = filled(dtype, q_heads=2, kv_heads=2, **fields).make()
    target = call.options["bias"] if where == "bias" else getattr(call, where)
    target[0, 1, 20] = value
    return call


BROKEN = (math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("mask", [None, "causal", "random"])
@pytest.mark.parametrize("value", [*BROKEN, 1e30, 1e-30, 1e-42], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_numbers_that_have_no_parts(amx, monkeypatch, where, value, mask):
    """inf, NaN, and rows that are huge or tiny: multiply-adds, whose bits come out."""
    call = changed(torch.float32, where, value, mask=mask)
    with poisoned():
        found = attend(call, "amx", monkeypatch)
    assert amx.tilewise_emulated_products() == 0
    assert same_bits(found, attend(call, "amx_fma", monkeypatch))


@each_split_dtype
@pytest.mark.parametrize("value", BROKEN, ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v", "d_out", "d_lse", "bias"])
def test_inf_and_nan_reach_what_they_reach_by_multiply_adds(amx, monkeypatch, where, value, dtype):
    """A row of d_out or d_lse makes the backward plain; a row of bias is none of the operands."""
    options = {"bias": "bhqk"} if where == "bias" else {}
    call = changed(dtype, where, value, **options)
    with poisoned():
        found = attend(call, "amx", monkeypatch)
    products = amx.tilewise_emulated_products()
    tilewise.attention(call.q, call.k, call.v, **call.options, backend="native")
    forward = amx.tilewise_emulated_products()
    assert (forward > 0) == (where not in "qkv")
    assert (products > forward) == (where == "bias" and value == -math.inf)
    plain = attend(call, "amx_fma", monkeypatch)
    close = {"atol": 8 * torch.finfo(dtype).eps, "rtol": 16 * torch.finfo(dtype).eps}
    for name, x in plain.items():
        torch.testing.assert_close(found[name], x, equal_nan=True, **close, msg=name)


@each_split_dtype
@pytest.mark.parametrize("value", [1e4, 6e-8], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v", "d_out", "d_lse", "bias"])
def test_large_and_small_numbers(amx, dtype, where, value):
    options = {"bias": "bhqk"} if where == "bias" else {}
    with poisoned():
        call = changed(dtype, where, value, **options)
        tolerance.check(call, tilewise.attention, tiles=3, backend="native")
    assert amx.tilewise_emulated_products() > 0


@pytest.mark.parametrize("magnitude", [1e8, 1e-10])
def test_all_numbers_large_or_small(amx, magnitude):
    """Near the bounds within which there are parts; scores stay as they are."""
    call = filled(torch.float32, magnitude=magnitude, scale=0.125 / magnitude**2).make()
    with poisoned():
        tolerance.check(call, tilewise.attention, tiles=3, backend="native")
    assert amx.tilewise_emulated_products() > 0


def test_zeros_and_subnormal_numbers_among_others(amx):
    """Rows of zeros, and numbers whose parts are lost in rows of ordinary size."""
    call = filled(torch.float32, q_heads=2, kv_heads=2).make()
    for x in (call.q, call.k, call.v, call.d_out):
        x[:, :, 6] = 0.0
        x[:, :, ::3, 5:9] *= 1e-36
        x[:, :, 1::3, 3] = 1e-42
    with poisoned():
        tolerance.check(call, tilewise.attention, tiles=3, backend="native")
    assert amx.tilewise_emulated_products() > 0


def test_subnormal_numbers_count_as_zeros_in_a_tile(amx):
    """As the instruction treats them: the emulation would otherwise prove too much."""
    q = torch.full((1, 1, 16, 32), 2.0**-127, dtype=torch.bfloat16)
    k = torch.full((1, 1, 32, 32), 2.0**127, dtype=torch.bfloat16)
    k[:, :, 16:] = 0.0
    _, lse = tilewise.attention(q, k, k, return_lse=True, backend="native")
    assert amx.tilewise_emulated_products() > 0
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(32)))
    exact = tilewise.attention(q.float(), k.float(), k.float(), return_lse=True, backend="native")
    assert (exact[1] > lse + 1).all()
    assert amx.tilewise_emulated_products() == 0


@each_split_dtype
def test_pages_give_the_same_bits(amx, dtype):
    lengths = torch.tensor([100, 330])
    q = torch.randn(2, 4, 20, 64).to(dtype)
    k, v = (torch.randn(2, 2, 336, 64).to(dtype) for _ in "kv")
    got = tilewise.decode(q, k, v, lengths=lengths, backend="native")
    assert amx.tilewise_emulated_products() > 0
    table = torch.randperm(2 * 14, dtype=torch.int32).view(2, 14)
    pages = [torch.zeros(28, 24, 2, 64, dtype=dtype) for _ in "kv"]
    for x, page in zip((k, v), pages, strict=True):
        page[table.long()] = x.view(2, 2, 14, 24, 64).permute(0, 2, 3, 1, 4)
    paged = tilewise.decode(q, *pages, lengths=lengths, page_table=table, backend="native")
    assert amx.tilewise_emulated_products() > 0
    assert torch.equal(paged, got)
    exact = (x.double() for x in (q, k, v))
    want = tilewise.attention(*exact, mask=m.lengths(lengths), backend="reference")
    atol = 5 * torch.finfo(dtype).eps  # values are below 5
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=0)
