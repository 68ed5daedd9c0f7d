"""PyTorch's ``scaled_dot_product_attention`` on tilewise, called by our name and by PyTorch's own.

Every case runs through ``tilewise.compat.sdpa`` and, with ``tilewise.enable()``, through
``torch.nn.functional``: results and gradients against the float64 oracle, and the oracle's reading
of the case against PyTorch in float64, which is never routed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tilewise
from tilewise.compat import sdpa, sdpa_routing
from tilewise.testing import oracle
from tilewise.testing.cases import Call, Case
from tilewise.testing.tolerance import largest_error, tolerances

Sdpa = Callable[..., Tensor]
LOW = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["direct", "routed"])
def attend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sdpa]:
    """Our function, or PyTorch's while it is routed; each call must reach tilewise."""
    if request.param == "direct":
        yield sdpa.scaled_dot_product_attention
        return
    ran = []

    def run(*args: Any) -> Tensor:
        ran.append(args)
        return original(*args)

    original = sdpa_routing.run
    monkeypatch.setattr(sdpa_routing, "run", run)

    def routed(*args: Any, **options: Any) -> Tensor:
        before = len(ran)
        out = F.scaled_dot_product_attention(*args, **options)
        assert len(ran) == before + 1, sdpa.why_not(*args, **options)
        return out

    with tilewise.enable():
        yield routed


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "4d": lambda x: x,
    "5d": lambda x: x.unflatten(0, (2, -1)),
    "6d": lambda x: x.unflatten(0, (2, 3, -1)),
    "3d": lambda x: x.squeeze(0),
    "2d": lambda x: x.squeeze(0).squeeze(0),
}
"""How a case's four dimensions are shown to PyTorch."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("4d", {}),
    "scale": ("4d", {"scale": 0.3}),
    "negative scale": ("4d", {"scale": -0.2}),
    "causal": ("4d", {"mask": "causal_start"}),
    "causal, longer keys": ("4d", {"mask": "causal_start", "kv_len": 53}),
    "causal, longer queries": ("4d", {"mask": "causal_start", "q_len": 53}),
    "bool": ("4d", {"mask": "random"}),
    "bool padding": ("4d", {"mask": "lengths"}),
    "bool documents": ("4d", {"mask": "packed_causal"}),
    "bool, rows that see nothing": ("4d", {"mask": "not_causal"}),
    "bool, nothing at all": ("4d", {"mask": "nothing"}),
    "float bhqk": ("4d", {"bias": "bhqk"}),
    "float hqk": ("4d", {"bias": "hqk"}),
    "float qk": ("4d", {"bias": "qk"}),
    "float b11k": ("4d", {"bias": "b11k"}),
    "dropout": ("4d", {"dropout_p": 0.3}),
    "dropout, causal": ("4d", {"dropout_p": 0.3, "mask": "causal_start"}),
    "dropout, bool": ("4d", {"dropout_p": 0.3, "mask": "random"}),
    "dropout, float": ("4d", {"dropout_p": 0.3, "bias": "qk"}),
    "v_dim": ("4d", {"v_dim": 9}),
    "gqa": ("4d", {"kv_heads": 2}),
    "mqa": ("4d", {"kv_heads": 1}),
    "gqa, dropout": ("4d", {"kv_heads": 2, "dropout_p": 0.2}),
    "gqa, longer keys": ("4d", {"kv_heads": 2, "kv_len": 53, "mask": "causal_start"}),
    "bshd": ("4d", {"layout": "bshd"}),
    "bshd, dropout": ("4d", {"layout": "bshd", "dropout_p": 0.2}),
    "sbhd": ("4d", {"layout": "sbhd"}),
    "sliced": ("4d", {"layout": "sliced"}),
    "transposed": ("4d", {"layout": "transposed"}),
    "expanded": ("4d", {"layout": "expanded"}),
    "one query": ("4d", {"q_len": 1}),
    "one key": ("4d", {"kv_len": 1}),
    "3d": ("3d", {"batch": 1}),
    "3d, causal": ("3d", {"batch": 1, "mask": "causal_start", "kv_len": 53}),
    "3d, bool": ("3d", {"batch": 1, "mask": "random"}),
    "3d, float": ("3d", {"batch": 1, "bias": "hqk"}),
    "3d, gqa": ("3d", {"batch": 1, "kv_heads": 2}),
    "2d": ("2d", {"batch": 1, "q_heads": 1, "kv_heads": 1}),
    "2d, dropout": ("2d", {"batch": 1, "q_heads": 1, "kv_heads": 1, "dropout_p": 0.2}),
    "5d": ("5d", {"batch": 6}),
    "5d, causal": ("5d", {"batch": 6, "mask": "causal_start"}),
    "5d, bool": ("5d", {"batch": 6, "mask": "random"}),
    "5d, float": ("5d", {"batch": 6, "bias": "bhqk"}),
    "5d, float shared": ("5d", {"batch": 6, "bias": "qk"}),
    "5d, gqa, dropout": ("5d", {"batch": 4, "kv_heads": 2, "dropout_p": 0.2}),
    "6d": ("6d", {"batch": 6, "mask": "random"}),
}


def arguments(call: Call, view: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """PyTorch's options for a case, without the float mask."""
    options: dict[str, Any] = {"enable_gqa": call.case.kv_heads != call.case.q_heads}
    if call.case.scale is not None:
        options["scale"] = call.case.scale
    if call.case.mask == "causal_start":
        options["is_causal"] = True
    elif call.case.mask is not None:
        options["attn_mask"] = view(oracle.visibility(call).contiguous())
    return options | {"dropout_p": call.case.dropout_p}


def drawn_seed(start: int) -> int:
    """The seed that the first call after ``torch.manual_seed(start)`` draws."""
    torch.manual_seed(start)
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))


def results(call: Call, view: Callable[[Tensor], Tensor], attend: Sdpa) -> dict[str, Tensor]:
    """``out`` and the gradients, by the oracle's names, with the case's shapes."""
    x = {name: t.detach().requires_grad_() for name, t in call.differentiable().items()}
    options = arguments(call, view)
    if "bias" in x:
        bias = x["bias"]
        options["attn_mask"] = view(bias) if bias.dim() == 4 and bias.shape[0] > 1 else bias
    torch.manual_seed(call.case.seed)
    out = attend(view(x["q"]), view(x["k"]), view(x["v"]), **options)
    assert out.dtype == call.case.dtype and out.shape == view(call.d_out).shape
    grads = torch.autograd.grad(out, list(x.values()), view(call.d_out))
    return {"out": out.detach().reshape(call.d_out.shape)} | {
        f"d_{name}": grad for name, grad in zip(x, grads, strict=True)
    }


def made(name: str, dtype: torch.dtype) -> tuple[Call, Callable[[Tensor], Tensor]]:
    shown, fields = CASES[name]
    call = Case(dtype=dtype, seed=len(name), **fields).make()
    call = replace(call, d_lse=torch.zeros_like(call.d_lse))
    if call.case.dropout_p:
        call.options["seed"] = drawn_seed(call.case.seed)
    return call, VIEWS[shown]


def check(call: Call, view: Callable[[Tensor], Tensor], attend: Sdpa) -> None:
    exact = oracle.run(call)
    allowed = tolerances(call, exact, tiles=1)
    got = results(call, view, attend)
    for name, result in got.items():
        error = largest_error(result, exact.tensors[name])
        assert error <= allowed[name], (name, error, allowed[name])
        if name != "out":
            assert result.dtype == call.differentiable()[name[2:]].dtype


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, dtype, attend):
    check(*made(name, dtype), attend)


@pytest.mark.parametrize("name", CASES)
def test_float64_goes_through_our_name(name):
    check(*made(name, torch.float64), sdpa.scaled_dot_product_attention)


@pytest.mark.parametrize("name", [name for name in CASES if "dropout" not in name])
def test_pytorch_in_float64_reads_the_case_as_the_oracle_does(name):
    check(*made(name, torch.float64), F.scaled_dot_product_attention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_mask_beside_narrow_inputs(dtype, attend):
    call = Case(dtype=dtype, bias="qk").make()
    bias = torch.randn(37, 37)
    options = call.options | {"bias": bias}
    zeros = torch.zeros_like(call.d_lse)
    check(replace(call, options=options, d_lse=zeros), VIEWS["4d"], attend)


BROADCAST = {
    "kv over batch": [(2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)],
    "q over batch": [(1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)],
    "kv over heads": [(2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)],
    "q over heads": [(2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)],
    "v over heads": [(2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 4)],
    "v enlarges": [(1, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 4)],
    "k without batch": [(2, 3, 5, 8), (3, 7, 8), (3, 7, 8)],
    "k without heads": [(2, 3, 5, 8), (7, 8), (7, 8)],
    "q without batch": [(3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)],
    "5d": [(2, 1, 3, 5, 8), (1, 4, 3, 7, 8), (2, 4, 1, 7, 8)],
}


@pytest.mark.parametrize("name", BROADCAST)
@pytest.mark.parametrize("gqa", [False, True])
def test_leading_dimensions_broadcast(name, gqa, attend):
    """The result is that of the expanded inputs, and the gradients are sums of theirs."""
    shapes = BROADCAST[name]
    if gqa and (len(shapes[1]) < 3 or shapes[0][-3] < max(s[-3] for s in shapes)):
        pytest.skip("enable_gqa takes no such heads")
    lead = torch.broadcast_shapes(*(s[:-2] for s in shapes))
    small = [torch.randn(s, requires_grad=True) for s in shapes]
    wide = [x.detach().expand(*lead, *x.shape[-2:]) for x in small]
    out = attend(*small, enable_gqa=gqa)
    d_out = torch.randn(out.shape)
    peer = F.scaled_dot_product_attention(*(x.detach().double() for x in small), enable_gqa=gqa)
    assert out.shape == peer.shape
    call = Case(head_dim=8).make()
    flat = [x.reshape(-1, *x.shape[-3:]) for x in wide]
    case = replace(call.case, batch=flat[0].shape[0], q_heads=lead[-1], kv_heads=lead[-1])
    call = Call(case, *flat, {}, d_out.view(-1, *out.shape[-3:]), torch.zeros(flat[0].shape[:3]))
    exact = oracle.run(call)
    allowed = tolerances(call, exact, tiles=1)
    for result in (peer, out):
        error = largest_error(result.detach().reshape(call.d_out.shape), exact.tensors["out"])
        assert error <= allowed["out"]
    grads = torch.autograd.grad(out, small, d_out)
    for letter, x, grad, whole in zip("qkv", small, grads, wide, strict=True):
        terms = exact.tensors[f"d_{letter}"].reshape(whole.shape)
        copies = whole.numel() // x.numel()
        # Each of n terms has its error, and adding them rounds n times, by a partial sum at most.
        bound = copies * (allowed[f"d_{letter}"] + _largest_sum(terms, x) * 2**-24)
        assert largest_error(grad, terms.sum_to_size(x.shape)) <= bound


def _largest_sum(terms: Tensor, like: Tensor) -> float:
    """The largest sum of absolute terms that make one entry of a tensor like ``like``."""
    return float(terms.abs().sum_to_size(like.shape).max())


def test_masks_that_broadcast_in_part(attend):
    """A mask over some of five dimensions, as in shifted windows; its gradient is summed."""
    q, k, v = (torch.randn(2, 3, 4, 6, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(3, 1, 6, 6, requires_grad=True)
    out = attend(q, k, v, mask)
    wide = mask.detach().expand(2, 3, 4, 6, 6).contiguous().requires_grad_()
    same = sdpa.scaled_dot_product_attention(q, k, v, wide)
    assert torch.equal(out, same)
    d_out = torch.randn(out.shape)
    (grad,) = torch.autograd.grad(out, mask, d_out)
    (whole,) = torch.autograd.grad(same, wide, d_out)
    assert grad.abs().sum() > 0
    want = whole.double().sum_to_size(mask.shape)
    assert largest_error(grad, want) <= 8 * _largest_sum(whole, mask) * 2**-24


def test_kv_heads_that_differ(attend):
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 2, 5, 8)
    out = attend(q, k, v, enable_gqa=True)
    same = attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(3, 1))
    assert torch.equal(out, same)


def test_everything_dropped(attend):
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, dropout_p=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_the_seed_comes_from_torch(attend):
    q = torch.randn(1, 2, 33, 8)
    torch.manual_seed(3)
    first, second = attend(q, q, q, dropout_p=0.5), attend(q, q, q, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(attend(q, q, q, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rows_without_keys_are_zero_here_and_there(dtype, attend):
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    visible = torch.ones(5, 5, dtype=torch.bool)
    visible[2] = False
    hidden = torch.zeros(5, 5, dtype=dtype).masked_fill(~visible, -torch.inf)
    for mask in (visible, hidden):
        for function in (attend, F.scaled_dot_product_attention):
            for at in (slice(None), 0):  # PyTorch's fused path, and its other one
                out = function(q[at], k[at], v[at], mask)
                grads = torch.autograd.grad(out.sum(), (q, k, v))
                assert not out[..., 2, :].any() and not grads[0][:, :, 2].any()
                assert all(bool(g.isfinite().all()) for g in grads) and out.any()


def test_the_smallest_number_as_a_mask_spreads_evenly(attend):
    """What transformers adds to hidden scores; in a row of nothing else all keys weigh the same."""
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 4:] = torch.finfo(torch.float32).min
    mask[..., 0, :] = torch.finfo(torch.float32).min
    out = attend(q, k, v, mask)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(out[..., 1:, :].double(), want[..., 1:, :], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out[..., 0, :], v.mean(2), atol=1e-6, rtol=1e-6)


LAYOUTS = ("bhsd", "bshd", "sbhd", "sliced", "transposed", "expanded")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"dropout_p": 0.2}, {"v_dim": 9}, {"bias": "qk"}, {"kv_heads": 2}, {"mask": "random"},
     {"q_len": 1}],
    ids=str,
)  # fmt: skip
def test_strides_are_those_of_pytorch(layout, fields, attend):
    call = Case(layout=layout, **fields).make()
    options = arguments(call, VIEWS["4d"])
    bias = call.options.get("bias")
    for needs_grad in (False, True):
        if bias is not None:
            options["attn_mask"] = bias.detach().requires_grad_(needs_grad)
        tilewise_out = attend(call.q, call.k, call.v, **options)
        wide = [
            x.double() if x.is_contiguous() else _as_double(x) for x in (call.q, call.k, call.v)
        ]
        if bias is not None:
            options["attn_mask"] = bias.detach().double().requires_grad_(needs_grad)
        peer = F.scaled_dot_product_attention(*wide, **options)
        strides = [
            s for s, n in zip(tilewise_out.stride(), tilewise_out.shape, strict=True) if n > 1
        ]
        assert strides == [s for s, n in zip(peer.stride(), peer.shape, strict=True) if n > 1]


def _as_double(x: Tensor) -> Tensor:
    """The same values and strides in float64, which is never routed."""
    storage = torch.empty(sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1)
    wide = storage.double().as_strided(x.shape, x.stride())
    wide.copy_(x) if 0 not in x.stride() else wide[:1].copy_(x[:1])
    return wide


def test_the_signature_is_that_of_pytorch():
    ours = inspect.signature(sdpa.scaled_dot_product_attention).parameters
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    assert list(ours) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        mine = ours[argument.name]
        assert (mine.kind is mine.KEYWORD_ONLY) == argument.kwarg_only
        default = argument.default_value if argument.has_default_value() else mine.empty
        assert mine.default == default and type(mine.default) is type(default)


X = torch.randn(2, 4, 5, 8)
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "causal and mask": ((X[0], X[0], X[0], torch.ones(5, 5)), {"is_causal": True}, "attn_mask"),
    "one dimension": ((X[0, 0, 0], X, X), {}, "query: expected at least 2 dimensions"),
    "dtypes": ((X, X.half(), X), {}, "key: dtype is torch.float16"),
    "integers": ((X.int(), X.int(), X.int()), {}, "query: dtype is torch.int32"),
    "head_dim": ((X, X[..., :4], X), {}, "key: head_dim is 4"),
    "batch": ((X, X[:1].expand(3, 4, 5, 8), X), {}, "key: leading dimensions"),
    "v batch": ((X, X, X[:1].expand(3, 4, 5, 8)), {}, "value: leading dimensions"),
    "heads": ((X, X[:, :2], X[:, :2]), {}, "key: leading dimensions.*enable_gqa"),
    "gqa heads": ((X, X[:, :3], X[:, :3]), {"enable_gqa": True}, "key: 3 heads"),
    "gqa, more kv heads": ((X[:, :2], X, X), {"enable_gqa": True}, "key: 4 heads"),
    "gqa in 2d": ((X[0, 0], X[0, 0], X[0, 0]), {"enable_gqa": True}, "query: enable_gqa needs 3"),
    "device": ((X, X.to("meta"), X), {}, "key: device is meta"),
    "mask dtype": ((X, X, X, torch.ones(5, 5).int()), {}, "attn_mask: dtype is torch.int32"),
    "mask wider": ((X, X, X, torch.ones(5, 5).double()), {}, "attn_mask: dtype is torch.float64"),
    "mask shape": ((X, X, X, torch.ones(4, 5)), {}, "attn_mask: shape is \\[4, 5\\]"),
    "mask enlarges": ((X[:1], X[:1], X[:1], torch.ones(2, 1, 5, 5)), {}, "attn_mask: shape"),
    "mask has more": ((X[0], X[0], X[0], torch.ones(1, 4, 5, 5)), {}, "attn_mask: shape"),
    "dropout": ((X, X, X), {"dropout_p": 1.5}, "dropout_p: got 1.5"),
    "negative dropout": ((X, X, X), {"dropout_p": -0.5}, "dropout_p: got -0.5"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_where_pytorch_raises_too(name):
    args, options, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        sdpa.scaled_dot_product_attention(*args, **options)
    with pytest.raises((RuntimeError, IndexError)) as plain:
        F.scaled_dot_product_attention(*args, **options)
    with tilewise.enable(), pytest.raises((RuntimeError, IndexError)) as routed:
        F.scaled_dot_product_attention(*args, **options)
    assert str(routed.value) == str(plain.value)


def test_errors_of_our_own():
    with pytest.raises(ValueError, match="value: length is 4 but key's is 5"):
        sdpa.scaled_dot_product_attention(X, X, X[:, :, :4])
    with pytest.raises(ValueError, match="scale: got inf"):
        sdpa.scaled_dot_product_attention(X, X, X, scale=float("inf"))
    with pytest.raises(ValueError, match="attn_mask: given together with is_causal"):
        sdpa.scaled_dot_product_attention(X, X, X, torch.ones(5, 5), is_causal=True)
    with pytest.raises(TypeError, match=r"query: expected .* got list"):
        sdpa.scaled_dot_product_attention([1.0], X, X)


@pytest.mark.parametrize("name", ["plain", "causal", "bool", "float hqk", "gqa", "5d, bool", "3d"])
def test_compile_traces_the_whole_call(name):
    torch.compiler.reset()
    call, view = made(name, torch.float32)
    options = arguments(call, view)

    def shown(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        mask = options if bias is None else options | {"attn_mask": bias}
        return sdpa.scaled_dot_product_attention(view(q), view(k), view(v), **mask)

    found = []
    for function in (shown, torch.compile(shown, fullgraph=True, backend="aot_eager")):
        x = [t.detach().requires_grad_() for t in call.differentiable().values()]
        out = function(*x, None) if len(x) == 3 else function(*x)
        found.append([out, *torch.autograd.grad(out, x, view(call.d_out))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
