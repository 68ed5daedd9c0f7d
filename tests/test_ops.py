"""The operators as PyTorch sees them: schema, fakes, tracing, gradients by differences."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tilewise import masks as m
from tilewise.testing.cases import Case


def tensors(*shape, n=3, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(n)]


def arguments(options, mask, needs_grad=True, dropout_p=0.0):
    """A full argument list of tilewise::attention on [2, 2, 9, 4]."""
    bias, alibi, relative_bias, sinks, seed = options
    scalars = (0.5, 2.0, dropout_p, 8, needs_grad, "auto")
    return (
        *tensors(2, 2, 9, 4),
        bias,
        alibi,
        relative_bias,
        sinks,
        seed,
        None,
        None,
        None,
        None,
        *mask,
        *scalars,
    )


NO_OPTIONS = (None, None, None, None, None)
BAND = (None, None, "band", -9, 0)


@pytest.mark.parametrize(
    "args",
    [
        arguments(NO_OPTIONS, BAND),
        arguments(
            (
                torch.randn(2, 1, 9, 9, requires_grad=True),
                torch.rand(1, 2, 1, requires_grad=True),
                torch.randn(2, 17, requires_grad=True),
                torch.randn(2, requires_grad=True),
                torch.tensor(5),
            ),
            (
                torch.zeros(1, 1, 9, 1, dtype=torch.int32),
                torch.full((1, 1, 9, 1), 7, dtype=torch.int32),
                "ranges",
                0,
                0,
            ),
            dropout_p=0.25,
        ),
    ],
    ids=["plain", "every option"],
)
def test_opcheck_forward(args):
    opcheck(torch.ops.tilewise.attention.default, args)


def test_opcheck_backward():
    args = tuple(
        a.detach() if isinstance(a, torch.Tensor) else a for a in arguments(NO_OPTIONS, BAND)
    )
    out, lse = torch.ops.tilewise.attention(*args)
    needs = [True, True, True, False, False, False, False]
    grads = (torch.randn_like(out), torch.randn_like(lse), out, lse, needs)
    opcheck(torch.ops.tilewise.attention_backward.default, (*grads, *args))


MASKS = {
    "none": lambda: None,
    "causal": m.causal,
    "prefix_lm": lambda: m.prefix(3) | m.causal(),
    "lengths": lambda: m.lengths(torch.tensor([5, 9])) & m.causal(),
    "documents": lambda: m.documents(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])),
    "predicate": lambda: m.from_predicate(lambda b, h, q, kv: (q + kv) % 2 == 0),
    "bool": lambda: m.from_bool(torch.ones(9, 9, dtype=torch.bool).tril()),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compile_traces_the_whole_call(name, where):
    torch.compiler.reset()
    q, k, v = tensors(2, 2, 9, 4)
    made = MASKS[name]()

    def f(q, k, v):
        mask = made if where == "outside" else MASKS[name]()
        return tilewise.attention(q * 2, k, v, mask=mask, softcap=3.0, return_lse=True)

    want, want_lse = f(q, k, v)
    got, lse = torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(got, want) and torch.equal(lse, want_lse)
    loss = [(x * x).sum() for x in (want, got)]
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v)) for x in loss), strict=True):
        assert torch.equal(a, b)


def test_compile_with_changing_lengths_and_dropout():
    torch.compiler.reset()

    def f(q, k, v, seed):
        return tilewise.attention(q, k, v, mask=m.causal(), dropout_p=0.5, seed=seed)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 13, 40):
        q, k, v = tensors(1, 2, length, 8)
        seed = torch.tensor(length)
        assert torch.equal(compiled(q, k, v, seed), f(q, k, v, seed))


def test_compile_draws_a_seed_that_manual_seed_governs():
    torch.compiler.reset()
    q, k, v = tensors(1, 2, 33, 8)
    f = torch.compile(
        lambda: tilewise.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(1)
    first, second = f(), f()
    torch.manual_seed(1)
    assert torch.equal(f(), first) and not torch.equal(first, second)


def test_compile_varlen_and_decode():
    torch.compiler.reset()
    q, k, v = (x.detach() for x in tensors(10, 2, 4))
    cu = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    f = torch.compile(tilewise.attention_varlen, fullgraph=True, backend="aot_eager")
    want = tilewise.attention_varlen(q, k, v, cu, mask=m.causal())
    assert torch.equal(f(q, k, v, cu, mask=m.causal()), want)
    q, k, v = (x.detach() for x in tensors(2, 2, 9, 4))
    lengths = torch.tensor([4, 9])
    g = torch.compile(tilewise.decode, fullgraph=True, backend="aot_eager")
    want = tilewise.decode(q[:, :, :1], k, v, lengths=lengths)
    assert torch.equal(g(q[:, :, :1], k, v, lengths=lengths), want)


DIFFERENTIABLE_CASES = {
    "plain": {},
    "causal": {"mask": "causal"},
    "predicate": {"mask": "predicate"},
    "softcap": {"softcap": 1.5},
    "bias": {"bias": "bhqk"},
    "broadcast bias": {"bias": "h1k"},
    "alibi": {"alibi": "h", "kv_len": 7},
    "relative_bias": {"relative_bias": True, "q_len": 7},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3},
    "everything": {
        "mask": "window",
        "softcap": 2.0,
        "bias": "qk",
        "alibi": "bh",
        "relative_bias": True,
        "sinks": True,
        "dropout_p": 0.2,
        "kv_heads": 1,
    },
}


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("name", DIFFERENTIABLE_CASES)
def test_gradcheck(name, backend, tile_sizes):
    """Every differentiable input, through out and through lse, in float64."""
    tile_sizes(3, 2)
    shape = {"batch": 2, "q_heads": 2, "kv_heads": 2, "q_len": 5, "kv_len": 5, "head_dim": 3}
    case = Case(**(shape | {"v_dim": 2} | DIFFERENTIABLE_CASES[name]), dtype=torch.float64)
    call = case.make()
    inputs = {n: t.detach().requires_grad_() for n, t in call.differentiable().items()}
    rest = {n: x for n, x in call.options.items() if n not in inputs}

    def f(*values):
        q, k, v, *others = values
        named = dict(zip(list(inputs)[3:], others, strict=True))
        return tilewise.attention(q, k, v, return_lse=True, backend=backend, **named, **rest)

    assert torch.autograd.gradcheck(f, tuple(inputs.values()))


def test_only_the_gradients_asked_for_are_computed():
    q, k, v = tensors(1, 2, 9, 4)
    bias = torch.randn(9, 9)
    out = tilewise.attention(q.detach(), k, v.detach(), bias=bias)
    out.sum().backward()
    assert k.grad is not None and bias.grad is None and q.grad is None


@pytest.mark.parametrize("backend", tilewise.dispatch.BACKENDS, indirect=True)
def test_gradients_are_the_same_bits_every_time(backend):
    call = Case(mask="documents", relative_bias=True, bias="h1k", kv_heads=2, dropout_p=0.1).make()
    inputs = {n: t.detach().requires_grad_() for n, t in call.differentiable().items()}
    rest = {n: x for n, x in call.options.items() if n not in inputs}
    runs = []
    for _ in range(3):
        out = tilewise.attention(**inputs, **rest, backend=backend)
        runs.append(torch.autograd.grad(out, list(inputs.values()), call.d_out))
    for later in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], later, strict=True))


class Watch(TorchDispatchMode):
    """Records the operators that run under it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_watched_call_is_one_operator_and_gives_the_same_bits(needs_grad):
    """Eager calls that nobody watches skip the operator, not the computation."""
    call = Case(mask="documents", bias="h1k", sinks=True, dropout_p=0.2).make()
    inputs = {n: t.detach().requires_grad_(needs_grad) for n, t in call.differentiable().items()}
    rest = {n: x for n, x in call.options.items() if n not in inputs}
    results = []
    for watch in (contextlib.nullcontext(), Watch()):
        with watch:
            found = [*tilewise.attention(**inputs, **rest, return_lse=True)]
            if needs_grad:
                found += torch.autograd.grad(found[0], list(inputs.values()), call.d_out)
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    operators = [name for name in watch.seen if name.startswith("tilewise.")]
    assert (
        operators
        == ["tilewise.attention.default", "tilewise.attention_backward.default"][: 1 + needs_grad]
    )


class Seen(torch.Tensor):
    """A subclass that records what is called with it."""

    seen = ()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Seen.seen += (str(func),)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks"])
def test_a_subclass_in_any_place_sees_the_operator(name, monkeypatch):
    monkeypatch.setattr(Seen, "seen", ())
    inputs = {n: torch.randn(1, 2, 9, 4) for n in "qkv"}
    inputs |= {"bias": torch.randn(1, 1, 9, 9), "sinks": torch.randn(2)}
    want = tilewise.attention(**inputs)
    assert Seen.seen == ()
    inputs[name] = inputs[name].as_subclass(Seen)
    out = tilewise.attention(**inputs)
    assert "tilewise.attention" in Seen.seen
    assert torch.equal(out.as_subclass(torch.Tensor), want)


@pytest.mark.parametrize("backend", tilewise.dispatch.BACKENDS, indirect=True)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("used", ["out", "lse"])
@pytest.mark.parametrize("q_len", [9, 0])
def test_an_output_that_is_not_used_is_as_if_its_gradient_were_zero(
    used, create_graph, q_len, backend
):
    call = Case(q_len=q_len, mask="causal", bias="h1k", sinks=True, kv_heads=2).make()
    inputs = {n: x.detach().requires_grad_() for n, x in call.differentiable().items()}
    found = []
    for both in (False, True):
        out, lse = tilewise.attention(**inputs, mask=m.causal(), return_lse=True, backend=backend)
        given = {"out": (out, call.d_out), "lse": (lse, call.d_lse)}
        outputs, grads = zip(*([given[used]] if not both else given.values()), strict=True)
        if both:
            other = "lse" if used == "out" else "out"
            grads = [x if n == used else torch.zeros_like(x) for n, (_, x) in given.items()]
            assert (grads[list(given).index(other)] == 0).all()
        found.append(
            torch.autograd.grad(outputs, list(inputs.values()), grads, create_graph=create_graph)
        )
    for name, a, b in zip(inputs, *found, strict=True):
        assert torch.equal(a, b), name
    assert q_len == 0 or all(x.abs().max() > 0 for n, x in zip(inputs, found[0], strict=True)
                             if used == "out" or n != "v")  # fmt: skip


def test_the_backward_without_lse_makes_no_zeros(monkeypatch):
    """Half a call's gradient arrives as None, not as a tensor of zeros."""
    module = tilewise.dispatch.backend_module("tiled")
    seen, original = [], module.backward
    monkeypatch.setattr(
        module, "backward", lambda *args: (seen.append(args[6]), original(*args))[1]
    )
    q, k, v = tensors(1, 2, 9, 4)
    tilewise.attention(q, k, v, backend="tiled").sum().backward()
    assert seen == [None]


def test_a_tensor_changed_before_the_backward_is_an_error():
    q, k, v = tensors(1, 2, 9, 4)
    kept = q * 1
    out = tilewise.attention(kept, k, v)
    kept.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    q, k, v = tensors(1, 2, 9, 4)
    out = tilewise.attention(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
