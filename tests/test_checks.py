"""Bad input: every public function names the argument, says what came, and never fails otherwise.

A row of a table is the arguments that differ from a good call, the argument that must be named
first in the message, and a part of the message that tells what came.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tilewise
from tilewise import checks
from tilewise import masks as m

NAN, INF = float("nan"), float("inf")
BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, DIM, V_DIM = 2, 4, 2, 5, 6, 8, 7
PAGES, PAGE_SIZE = 5, 3


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def dense_call():
    return {
        "q": t(BATCH, HEADS, Q_LEN, DIM),
        "k": t(BATCH, KV_HEADS, KV_LEN, DIM),
        "v": t(BATCH, KV_HEADS, KV_LEN, V_DIM),
    }


def packed_call():
    """Two sequences of 2 + 3 queries and 6 + 3 keys."""
    return {
        "q": t(5, HEADS, DIM),
        "k": t(9, KV_HEADS, DIM),
        "v": t(9, KV_HEADS, V_DIM),
        "cu_seqlens_q": ints(0, 2, 5),
        "cu_seqlens_k": ints(0, 6, 9),
    }


def cached_call():
    return {
        "q": t(BATCH, HEADS, 1, DIM),
        "k_cache": t(BATCH, KV_HEADS, KV_LEN, DIM),
        "v_cache": t(BATCH, KV_HEADS, KV_LEN, V_DIM),
        "lengths": ints(3, 6),
    }


def paged_call():
    return {
        "q": t(BATCH, HEADS, 1, DIM),
        "k_cache": t(PAGES, PAGE_SIZE, KV_HEADS, DIM),
        "v_cache": t(PAGES, PAGE_SIZE, KV_HEADS, V_DIM),
        "lengths": ints(3, 6),
        "page_table": torch.tensor([[0, 4], [1, 2]], dtype=torch.int32),
    }


FUNCTIONS = {
    "attention": (tilewise.attention, dense_call),
    "standard_attention": (tilewise.standard_attention, dense_call),
    "explain": (tilewise.explain, dense_call),
    "attention_varlen": (tilewise.attention_varlen, packed_call),
    "decode": (tilewise.decode, cached_call),
    "decode_paged": (tilewise.decode, paged_call),
}
SCALARS = [
    *[({"scale": x}, "scale", shown) for x, shown in
      ((NAN, "nan"), (INF, "inf"), (-INF, "-inf"), ("x", "'x'"), (True, "True"), (t(1), "tensor"))],
    *[({"softcap": x}, "softcap", shown) for x, shown in
      ((0, "0"), (0.0, "0.0"), (-1.0, "-1.0"), (NAN, "nan"), (INF, "inf"), ("x", "'x'"),
       (True, "True"))],
    ({"scale": 10**400}, "scale", ""),
    ({"scale": Fraction(10**400)}, "scale", ""),
    *[({name: np.bool_(True)}, name, "True") for name in ("scale", "softcap")],
    *[({"scale": x}, "scale", shown) for x, shown in
      ((np.float32(NAN), "nan"), (np.float64(INF), "inf"), (np.ones(1), "[1.]"), (1j, "1j"))],
]  # fmt: skip
DROPOUT = [
    *[({"dropout_p": x}, "dropout_p", shown) for x, shown in
      ((-0.1, "-0.1"), (1.0, "1.0"), (1, "1"), (2.5, "2.5"), (NAN, "nan"), (INF, "inf"),
       ("x", "'x'"), (True, "True"), (None, "None"), (np.float32(1), "1.0"))],
    *[({"seed": x, "dropout_p": p}, "seed", shown) for p in (0.0, 0.5) for x, shown in
      ((1.5, "1.5"), ("x", "'x'"), (True, "True"), (2**64, str(2**64)), (-(2**63) - 1, "-9223"),
       (np.float64(3), "3.0"), (np.bool_(True), "True"), (np.ones(1, int), "[1]"),
       (t(), "float32"), (ints(3), "int32"), (ints(1, 2, dtype=torch.int64), "[2]"),
       (t(dtype=torch.int64, device="meta"), "meta"))],
]  # fmt: skip
BACKEND = [
    ({"backend": x}, "backend", shown)
    for x, shown in (("cuda", "'cuda'"), ("TILED", "'TILED'"), ("", "''"), (None, "None"), (3, "3"))
]
QKV = [
    *[({name: x}, name, shown) for name in ("q", "k", "v") for x, shown in
      ((None, "NoneType"), ([[1.0]], "list"), (np.zeros((2, 2, 5, 8)), "ndarray"), (1.0, "float"))],
    *[({name: x}, name, shown) for name in ("q", "k", "v") for x, shown in
      ((t(), "got 0"), (t(3), "got 1"), (t(2, 2), "got 2"), (t(1, 2, 2, 5, 8), "got 5"))],
]  # fmt: skip
DENSE = [
    *[({"q": t(2, 4, 5, 8, dtype=d)}, "q", str(d)) for d in
      (torch.int64, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2)],
    ({"q": t(2, 5, 8)}, "q", "got 3"),
    ({"k": t(2, 6, 8)}, "k", "[2, 6, 8]"),
    ({"k": t(3, 2, 6, 8)}, "k", "3"),
    ({"k": t(2, 2, 6, 9)}, "k", "9"),
    ({"k": t(2, 3, 6, 8)}, "q", "3 kv heads"),
    ({"k": t(2, 0, 6, 8), "v": t(2, 0, 6, 7)}, "q", "0 kv heads"),
    ({"q": t(2, 0, 5, 8)}, "q", "0 heads"),
    ({"q": t(2, 4, 5, 0), "k": t(2, 2, 6, 0)}, "q", "0"),
    ({"k": t(2, 2, 6, 8, dtype=torch.float64)}, "k", "torch.float64"),
    ({"k": t(2, 2, 6, 8, dtype=torch.int64)}, "k", "torch.int64"),
    ({"k": t(2, 2, 6, 8, device="meta")}, "k", "meta"),
    ({"v": t(3, 2, 6, 7)}, "v", "[3, 2, 6]"),
    ({"v": t(2, 4, 6, 7)}, "v", "[2, 4, 6]"),
    ({"v": t(2, 2, 5, 7)}, "v", "[2, 2, 5]"),
    ({"v": t(2, 2, 6, 7, dtype=torch.bfloat16)}, "v", "torch.bfloat16"),
    ({"v": t(2, 2, 6, 7, device="meta")}, "v", "meta"),
    ({"q": t(2, 4, 5, 8, device="meta")}, "k", "cpu"),
]  # fmt: skip
DENSE_OPTIONS = [
    ({"mask": "causal"}, "mask", "str"),
    ({"mask": m.causal}, "mask", "function"),
    ({"mask": True}, "mask", "bool"),
    ({"mask": t(5, 6)}, "mask", "torch.float32"),
    ({"mask": t(5, 6, dtype=torch.uint8)}, "mask", "torch.uint8"),
    ({"mask": t(5, 5, dtype=torch.bool)}, "mask", "5, 5]"),
    ({"mask": t(6, 5, dtype=torch.bool)}, "mask", "6, 5]"),
    ({"mask": t(3, 1, 5, 6, dtype=torch.bool)}, "mask", "[3, 1, 5, 6]"),
    ({"mask": t(2, 2, 5, 6, dtype=torch.bool)}, "mask", "[2, 2, 5, 6]"),
    ({"mask": t(1, 1, 1, 5, 6, dtype=torch.bool)}, "mask", "5"),
    ({"mask": m.from_bool(t(7, dtype=torch.bool))}, "mask", "7]"),
    ({"mask": m.lengths(ints(1, 2, 3))}, "mask", "3"),
    ({"mask": ~(m.causal() & m.lengths(ints(1)))}, "mask", "1"),
    ({"mask": m.prefix(ints(1, 2, 3))}, "mask", "3"),
    ({"mask": m.documents(ints(*range(5)))}, "mask", "5]"),
    ({"mask": m.documents(ints(*range(6)))}, "mask", "6]"),
    ({"mask": m.documents(t(3, 5, dtype=torch.int64), ints(*range(6)))}, "mask", "[3, 5]"),
    ({"mask": m.documents(ints(*range(5)), t(3, 6, dtype=torch.int64))}, "mask", "[3, 6]"),
    ({"mask": m.from_predicate(lambda b, h, q, kv: q - kv)}, "mask", "torch.int64"),
    ({"mask": m.from_predicate(lambda b, h, q, kv: True)}, "mask", "bool"),
    ({"mask": m.from_predicate(lambda b, h, q, kv: (q == kv)[..., :2])}, "mask", "2]"),
    ({"mask": m.from_predicate(lambda b, h, q, kv: (q == kv).expand(3, 4, 5, 6))}, "mask", "[3, 4"),
    ({"mask": m.from_predicate(lambda b, h, q, kv: (q == kv)[None])}, "mask", "1, 1, 1, 5, 6]"),
    ({"bias": t(5)}, "bias", "[5]"),
    ({"bias": t(5, 5)}, "bias", "[5, 5]"),
    ({"bias": t(3, 1, 1, 6)}, "bias", "[3, 1, 1, 6]"),
    ({"bias": t(2, 2, 5, 6)}, "bias", "[2, 2, 5, 6]"),
    ({"bias": t(1, 1, 1, 5, 6)}, "bias", "[1, 1, 1, 5, 6]"),
    ({"bias": t(5, 0)}, "bias", "[5, 0]"),
    ({"bias": t(5, 6, dtype=torch.bool)}, "bias", "torch.bool"),
    ({"bias": t(5, 6, dtype=torch.int32)}, "bias", "torch.int32"),
    ({"bias": t(5, 6, device="meta")}, "bias", "meta"),
    ({"bias": 0.5}, "bias", "float"),
    ({"alibi": t()}, "alibi", "[]"),
    ({"alibi": t(3)}, "alibi", "[3]"),
    ({"alibi": t(1, 4)}, "alibi", "[1, 4]"),
    ({"alibi": t(4, 2)}, "alibi", "[4, 2]"),
    ({"alibi": t(2, 4, 1)}, "alibi", "[2, 4, 1]"),
    ({"alibi": t(4, dtype=torch.int64)}, "alibi", "torch.int64"),
    ({"alibi": t(4, device="meta")}, "alibi", "meta"),
    ({"alibi": True}, "alibi", "bool"),
    ({"relative_bias": t(4, 9)}, "relative_bias", "[4, 9]"),
    ({"relative_bias": t(4, 11)}, "relative_bias", "[4, 11]"),
    ({"relative_bias": t(1, 10)}, "relative_bias", "[1, 10]"),
    ({"relative_bias": t(10)}, "relative_bias", "[10]"),
    ({"relative_bias": t(4, 10, dtype=torch.int64)}, "relative_bias", "torch.int64"),
    ({"relative_bias": [0.0] * 10}, "relative_bias", "list"),
    ({"sinks": t()}, "sinks", "[]"),
    ({"sinks": t(2)}, "sinks", "[2]"),
    ({"sinks": t(1, 4)}, "sinks", "[1, 4]"),
    ({"sinks": t(4, dtype=torch.int64)}, "sinks", "torch.int64"),
    ({"sinks": t(4, device="meta")}, "sinks", "meta"),
    ({"sinks": (0.0,) * 4}, "sinks", "tuple"),
]
PACKED = [
    ({"q": t(2, 4, 5, 8)}, "q", "[2, 4, 5, 8]"),
    ({"q": t(5, 4, 8, dtype=torch.int64)}, "q", "torch.int64"),
    ({"q": t(5, 3, 8)}, "q", "3 heads"),
    ({"k": t(9, 2, 7)}, "k", "7"),
    ({"k": t(9, 2, 8, dtype=torch.float16)}, "k", "torch.float16"),
    ({"v": t(8, 2, 7)}, "v", "[8, 2]"),
    ({"v": t(9, 4, 7)}, "v", "[9, 4]"),
    *[({name: x}, name, shown) for name in ("cu_seqlens_q", "cu_seqlens_k") for x, shown in
      (([0, 2, 9], "list"), (3, "int"), (t(3), "torch.float32"),
       (ints(0, 1, dtype=torch.int16), "torch.int16"), (t(3, dtype=torch.bool), "torch.bool"),
       (t(1, 3, dtype=torch.int32), "[1, 3]"), (t(dtype=torch.int32), "[]"), (ints(), "[0]"),
       (t(3, dtype=torch.int32, device="meta"), "meta"), (ints(-1, 2, 9), "[-1, 2, 9]"),
       (ints(0, -2, 9), "[0, -2, 9]"), (ints(0, 4, 3), "[0, 4, 3]"), (ints(1, 2, 9), "[1, 2, 9]"),
       (ints(0, 2, 4), "[0, 2, 4]"), (ints(0, 2, 99), "[0, 2, 99]"), (ints(0), "[0]"),
       (ints(*range(0, -30, -1)), "..."))],
    ({"cu_seqlens_q": None}, "cu_seqlens_q", "NoneType"),
    ({"cu_seqlens_k": None}, "cu_seqlens_k", "[0, 2, 5]"),
    ({"cu_seqlens_k": ints(0, 3, 6, 9)}, "cu_seqlens_k", "3"),
    ({"cu_seqlens_k": ints(0, 9)}, "cu_seqlens_k", "1"),
    ({"mask": t(5, 9, dtype=torch.bool)}, "mask", "tensor"),
    ({"mask": m.from_bool(t(5, 9, dtype=torch.bool))}, "mask", "from_bool"),
    ({"mask": m.from_bool(t(5, 9, dtype=torch.bool)) | m.causal()}, "mask", "from_bool"),
    ({"mask": "causal"}, "mask", "str"),
    ({"mask": m.lengths(ints(4))}, "mask", "1"),
    ({"mask": m.lengths(ints(4, 3, 2))}, "mask", "3"),
    ({"mask": m.documents(ints(*range(5)))}, "mask", "5]"),
    ({"mask": m.documents(ints(*range(5)), ints(*range(8)))}, "mask", "8]"),
    ({"bias": t(4, 5, 8)}, "bias", "[4, 5, 8]"),
    ({"bias": t(2, 4, 5, 9)}, "bias", "[2, 4, 5, 9]"),
    ({"alibi": t(3, 4)}, "alibi", "[3, 4]"),
    ({"alibi": t(2)}, "alibi", "[2]"),
    ({"relative_bias": t(4, 13)}, "relative_bias", "[4, 13]"),
    ({"relative_bias": t(4, 7)}, "relative_bias", "[4, 7]"),
    ({"sinks": t(2)}, "sinks", "[2]"),
]  # fmt: skip
LENGTHS = [({"lengths": x}, "lengths", shown) for x, shown in
           ((None, "NoneType"), (6, "int"), ([3, 6], "list"), (t(2), "torch.float32"),
            (t(2, dtype=torch.bool), "torch.bool"), (ints(3), "[1]"), (ints(3, 6, 1), "[3]"),
            (t(2, 1, dtype=torch.int32), "[2, 1]"), (t(dtype=torch.int32), "[]"),
            (ints(-1, 3), "[-1, 3]"), (ints(3, 7), "[3, 7]"),
            (t(2, dtype=torch.int32, device="meta"), "meta"))]  # fmt: skip
CACHED = [
    ({"q": t(2, 4, 8)}, "q", "[2, 4, 8]"),
    ({"q": t(3, 4, 1, 8)}, "k_cache", "2"),
    ({"q": t(2, 3, 1, 8)}, "q", "3 heads"),
    ({"k_cache": t(2, 2, 8)}, "k_cache", "[2, 2, 8]"),
    ({"k_cache": None}, "k_cache", "NoneType"),
    ({"k_cache": t(3, 2, 6, 8)}, "k_cache", "3"),
    ({"k_cache": t(2, 2, 6, 4)}, "k_cache", "4"),
    ({"k_cache": t(2, 2, 6, 8, dtype=torch.int8)}, "k_cache", "torch.int8"),
    ({"k_cache": t(2, 2, 6, 8, dtype=torch.float16)}, "k_cache", "torch.float16"),
    ({"k_cache": t(2, 2, 6, 8, device="meta")}, "k_cache", "meta"),
    ({"v_cache": t(2, 2, 5, 7)}, "v_cache", "[2, 2, 5]"),
    ({"v_cache": t(2, 2, 6)}, "v_cache", "got 3"),
    ({"v_cache": "cache"}, "v_cache", "str"),
    ({"mask": t(1, 5, dtype=torch.bool)}, "mask", "1, 5]"),
    ({"mask": t(1, 6)}, "mask", "torch.float32"),
    ({"mask": m.lengths(ints(1, 2, 3))}, "mask", "3"),
    ({"mask": m.documents(ints(1), ints(1, 2, 3))}, "mask", "3]"),
    ({"mask": 1}, "mask", "int"),
    ({"bias": t(1, 5)}, "bias", "[1, 5]"),
    ({"alibi": t(2)}, "alibi", "[2]"),
    ({"relative_bias": t(4, 5)}, "relative_bias", "[4, 5]"),
    ({"sinks": t(4, 1)}, "sinks", "[4, 1]"),
]
PAGED = [
    *[({"page_table": x}, "page_table", shown) for x, shown in
      (([[0, 1], [2, 3]], "list"), (3, "int"), (t(2, 2), "torch.float32"), (ints(0, 1), "[2]"),
       (t(3, 2, dtype=torch.int32), "[3, 2]"), (t(2, 2, 1, dtype=torch.int32), "[2, 2, 1]"),
       (t(2, 2, dtype=torch.int32, device="meta"), "meta"),
       (torch.tensor([[0, 4], [1, 5]]), "5"), (torch.tensor([[-1, 4], [1, 2]]), "-1"),
       (torch.tensor([[0, 4], [-(2**31), 2]]), str(-(2**31))))],
    ({"page_table": torch.tensor([[0], [1]])}, "lengths", "[3, 6]"),
    ({"k_cache": t(5, 0, 2, 8), "v_cache": t(5, 0, 2, 7)}, "k_cache", "0"),
    ({"k_cache": t(5, 3, 3, 8), "v_cache": t(5, 3, 3, 7)}, "q", "3 kv heads"),
    ({"k_cache": t(5, 3, 2, 9)}, "k_cache", "9"),
    ({"k_cache": t(5, 2, 8)}, "k_cache", "[5, 2, 8]"),
    ({"v_cache": t(4, 3, 2, 7)}, "v_cache", "[4, 3, 2]"),
    ({"v_cache": t(5, 3, 1, 7)}, "v_cache", "[5, 3, 1]"),
    ({"mask": m.from_bool(t(1, 15, dtype=torch.bool))}, "mask", "15]"),
]  # fmt: skip
GRADIENTS = [({name: x.requires_grad_()}, "q", "requires a gradient") for name, x in
             (("q", t(2, 4, 1, 8)), ("bias", t(6)), ("alibi", t(4)), ("sinks", t(4)))]  # fmt: skip

TABLES = {
    "attention": [*QKV, *DENSE, *DENSE_OPTIONS, *SCALARS, *DROPOUT, *BACKEND],
    "standard_attention": [*QKV, *DENSE, *DENSE_OPTIONS, *SCALARS, *DROPOUT],
    "explain": [*QKV, *DENSE, *DENSE_OPTIONS, *SCALARS, *DROPOUT, *BACKEND],
    "attention_varlen": [*QKV, *PACKED, *SCALARS, *DROPOUT, *BACKEND],
    "decode": [*LENGTHS, *CACHED, *SCALARS, *BACKEND, *GRADIENTS],
    "decode_paged": [*LENGTHS, *PAGED, *SCALARS, *BACKEND, *GRADIENTS],
}


def shown(x: object) -> str:
    """For a test's name, which must be the same in every process: no addresses."""
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    return x.__name__ if callable(x) else repr(x)[:40]


@pytest.mark.parametrize(
    "function, changes, argument, came",
    [
        pytest.param(f, *row, id=f"{f}-" + ",".join(f"{n}={shown(x)}" for n, x in row[0].items()))
        for f, rows in TABLES.items()
        for row in rows
    ],
)
def test_bad_input(function, changes, argument, came):
    call, make = FUNCTIONS[function]
    with pytest.raises((ValueError, TypeError)) as raised:
        call(**make() | changes)
    message = str(raised.value)
    assert re.match(rf"{argument}\b", message), f"does not name {argument} first: {message}"
    assert came in message, f"does not say what came: {message}"
    assert len(message) < 600


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_good_calls_are_good(function):
    call, make = FUNCTIONS[function]
    call(**make())
    call(**make(), sinks=t(HEADS), alibi=t(HEADS), scale=0, softcap=3, mask=m.causal())
    call(**make(), alibi=t(BATCH, HEADS, dtype=torch.float64), bias=t(1), mask=m.prefix(ints(1, 0)))


NUMPY = {
    "scale": (np.float32(0.25), np.float16(0.25), np.int64(2), np.float64(0.25), Fraction(1, 4)),
    "softcap": (np.float32(2.5), np.uint8(2)),
    "dropout_p": (np.float32(0.5), np.float64(0.5), np.int8(0)),
    "seed": (np.int64(-3), np.uint64(2**64 - 1), np.int32(7), np.uint8(7)),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("option", NUMPY)
def test_numbers_of_numpy_are_numbers(option, function):
    call, make = FUNCTIONS[function]
    if option in ("dropout_p", "seed") and function.startswith("decode"):
        pytest.skip("decode has no dropout")
    rest = {} if function.startswith("decode") else {"dropout_p": 0.5, "seed": 3}
    tensors = {n: torch.randn(x.shape) if x.is_floating_point() else x for n, x in make().items()}
    for number in NUMPY[option]:
        plain = int(number) if option == "seed" else float(number)
        found = call(**tensors, **rest | {option: number})
        want = call(**tensors, **rest | {option: plain})
        same = torch.equal if isinstance(found, torch.Tensor) else lambda a, b: str(a) == str(b)
        assert same(found, want)


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, -(2**63), torch.tensor(3), torch.tensor([-4])])
@pytest.mark.parametrize("function", ["attention", "standard_attention", "attention_varlen"])
def test_good_seeds(function, seed):
    call, make = FUNCTIONS[function]
    tensors = {n: x + torch.ones(()) if x.is_floating_point() else x for n, x in make().items()}
    out = call(**tensors, dropout_p=0.5, seed=seed)
    assert torch.equal(call(**tensors, dropout_p=0.5, seed=seed), out)
    assert not torch.equal(call(**tensors, dropout_p=0.5, seed=12345), out)


def test_extreme_probabilities_are_in_range():
    tilewise.attention(**dense_call(), dropout_p=0)
    tilewise.attention(**dense_call(), dropout_p=math.nextafter(1, 0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_dtypes_of_tables(dtype):
    changes = {n: x.to(dtype) for n, x in paged_call().items() if not x.is_floating_point()}
    tilewise.decode(**paged_call() | changes)
    changes = {n: x.to(dtype) for n, x in packed_call().items() if not x.is_floating_point()}
    tilewise.attention_varlen(**packed_call() | changes)


def test_page_table_entries_beyond_a_length_may_hold_anything():
    table = torch.tensor([[0, -7], [1, 2]])
    good = tilewise.decode(**paged_call())
    assert torch.equal(tilewise.decode(**paged_call() | {"page_table": table}), good)
    with pytest.raises(ValueError, match=r"^page_table: entry -7"):
        tilewise.decode(**paged_call() | {"page_table": table, "lengths": ints(4, 6)})


def test_decode_takes_parameters_without_gradients():
    sinks = t(HEADS).requires_grad_()
    with torch.no_grad():
        assert not tilewise.decode(**cached_call(), sinks=sinks).requires_grad


CONSTRUCTORS = [
    (lambda: m.window(-1, 0), "window: left", "-1"),
    (lambda: m.window(0, -3), "window: right", "-3"),
    (lambda: m.window(1.5, 0), "window: left", "1.5"),
    (lambda: m.window(0, True), "window: right", "True"),
    (lambda: m.window(0, "x"), "window: right", "'x'"),
    (lambda: m.window(0, 0, "middle"), "window: align", "'middle'"),
    (lambda: m.window(0, 0, align=None), "window: align", "None"),
    (lambda: m.causal("middle"), "causal: align", "'middle'"),
    (lambda: m.prefix(-1), "prefix: n", "-1"),
    (lambda: m.prefix(2.0), "prefix: n", "2.0"),
    (lambda: m.prefix(True), "prefix: n", "True"),
    (lambda: m.prefix(None), "prefix: n", "None"),
    (lambda: m.prefix(t(2)), "prefix: n", "torch.float32"),
    (lambda: m.prefix(t(2, 1, dtype=torch.int64)), "prefix: n", "[2, 1]"),
    (lambda: m.lengths(3), "lengths: kv_lengths", "3"),
    (lambda: m.lengths([3, 4]), "lengths: kv_lengths", "[3, 4]"),
    (lambda: m.lengths(t(2)), "lengths: kv_lengths", "torch.float32"),
    (lambda: m.lengths(t(2, dtype=torch.bool)), "lengths: kv_lengths", "torch.bool"),
    (lambda: m.lengths(t(dtype=torch.int64)), "lengths: kv_lengths", "[]"),
    (lambda: m.documents([1, 2]), "documents: q_ids", "list"),
    (lambda: m.documents(t(3)), "documents: q_ids", "torch.float32"),
    (lambda: m.documents(t(3, dtype=torch.bool)), "documents: q_ids", "torch.bool"),
    (lambda: m.documents(t(3, dtype=torch.complex64)), "documents: q_ids", "torch.complex64"),
    (lambda: m.documents(ints(1), [1]), "documents: kv_ids", "list"),
    (lambda: m.documents(ints(1), t(1, 1, 1, dtype=torch.int64)), "documents: kv_ids", "[1, 1, 1]"),
    (lambda: m.documents(t(dtype=torch.int64)), "documents: q_ids", "[]"),
    (lambda: m.chunks(0), "chunks: size", "0"),
    (lambda: m.chunks(-4), "chunks: size", "-4"),
    (lambda: m.chunks(2.0), "chunks: size", "2.0"),
    (lambda: m.chunks(True), "chunks: size", "True"),
    (lambda: m.dilated(0), "dilated: step", "0"),
    (lambda: m.dilated("2"), "dilated: step", "'2'"),
    (lambda: m.from_bool(t(3)), "from_bool: tensor", "torch.float32"),
    (lambda: m.from_bool([True]), "from_bool: tensor", "list"),
    (lambda: m.from_bool(t(1, 1, 1, 1, 1, dtype=torch.bool)), "from_bool: tensor", "5"),
    (lambda: m.from_predicate(None), "from_predicate: fn", "NoneType"),
    (lambda: m.causal() & 3, "a mask", "int"),
    (lambda: m.causal() | t(3), "a mask", "Tensor"),
    (lambda: m.causal() & None, "a mask", "NoneType"),
]


@pytest.mark.parametrize("row", range(len(CONSTRUCTORS)))
def test_mask_constructors(row):
    make, start, came = CONSTRUCTORS[row]
    with pytest.raises((ValueError, TypeError)) as raised:
        make()
    assert str(raised.value).startswith(start)
    assert came in str(raised.value)


def test_where_data_is_not_to_be_read_the_program_asserts(monkeypatch):
    """A CUDA graph that is being recorded may not wait for the device. On the CPU the assertion is
    made at once."""
    monkeypatch.setattr(checks, "is_deferred", lambda x: True)
    tilewise.decode(**paged_call())
    with pytest.raises(RuntimeError, match="lengths: a length is negative or beyond the cache"):
        tilewise.decode(**paged_call() | {"lengths": ints(3, 1000)})
    monkeypatch.undo()
    for recording in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda at=recording: at)
        assert checks.is_deferred(SimpleNamespace(is_cuda=True)) is recording
        assert checks.is_deferred(SimpleNamespace(is_cuda=False)) is False
