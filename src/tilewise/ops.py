"""The operators that PyTorch sees: schemas, shapes for tracing, and the derivative's wiring.

``tilewise::attention`` and ``tilewise::attention_backward`` are opaque to ``torch.compile``, which
traces them whole (``fullgraph=True``). The backend is chosen inside, when shapes are real numbers,
by the same function that ``explain`` asks. Where nobody looks on, an eager call runs the operator's
body directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import backend_module, choose
from .problem import DIFFERENTIABLE, Inputs, Problem
from .tensors import like_queries
from .tiles import flatten, unflatten

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi, Tensor? relative_bias, "
    "Tensor? sinks, Tensor? seed, Tensor? position, Tensor? page_table, Tensor? mask_first, "
    "Tensor? mask_second, str mask_kind, SymInt mask_low, SymInt mask_high, float scale, "
    "float softcap, float dropout_p, SymInt relative_zero, bool needs_grad, str backend"
)
_NAMES = [argument.split()[-1] for argument in _CALL.split(",")]
_TENSORS = _NAMES.index("mask_kind")
"""How many of the arguments are tensors; they come first."""
_LIBRARY = torch.library.Library("tilewise", "DEF")
_LIBRARY.define(f"attention({_CALL}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    f"attention_backward(Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, bool[] needs, {_CALL})"
    f" -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attention(
    inputs: Inputs,
    *,
    scale: float,
    softcap: float,
    dropout_p: float,
    relative_zero: int,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of a call whose arguments have been checked; differentiable."""
    call = (
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.bias,
        inputs.alibi,
        inputs.relative_bias,
        inputs.sinks,
        inputs.seed,
        inputs.position,
        inputs.page_table,
        *flatten(inputs.mask),
        scale,
        softcap,
        dropout_p,
        relative_zero,
        needs_grad,
        backend,
    )
    if _is_observed(inputs.q):
        return torch.ops.tilewise.attention(*call)
    return _Eager.apply(*call) if needs_grad else _forward(*call)


def _is_observed(q: Tensor) -> bool:
    """Whether something other than eager autograd has to see an operator: a compiler, a tracer, a
    dispatch mode, a tensor subclass, a functorch transform."""
    return (
        torch.compiler.is_compiling()
        or type(q) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _unpack(call: Sequence[Any]) -> tuple[Inputs, Problem, str]:
    """The arguments of a call, in the order of its schema, as the house's own objects."""
    q, k, v, bias, alibi, relative_bias, sinks, seed, position, page_table = call[:10]
    first, second, kind, low, high = call[10:15]
    scale, softcap, dropout_p, relative_zero, needs_grad, backend = call[15:]
    kv_len = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[1]
    inputs = Inputs(
        q,
        k,
        v,
        unflatten(first, second, kind, low, high, q.shape[2], kv_len),
        bias,
        alibi,
        relative_bias,
        sinks,
        seed,
        position,
        page_table,
    )
    problem = Problem.of(
        inputs,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        relative_zero=relative_zero,
        needs_grad=needs_grad,
    )
    return inputs, problem, backend


def _forward(*call: Any) -> tuple[Tensor, Tensor]:
    inputs, problem, backend = _unpack(call)
    plan = choose(problem, backend)
    if problem.is_empty:
        out = like_queries(inputs.q, problem.v_dim).zero_()
        lse = inputs.q.new_full(out.shape[:3], -torch.inf, dtype=problem.compute_dtype)
        return out, lse if inputs.sinks is None else lse.copy_(inputs.sinks.view(1, -1, 1))
    return backend_module(plan.backend).forward(problem, inputs, plan)


def _backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, needs: Sequence[bool], *call: Any
) -> tuple[Tensor, ...]:
    inputs, problem, backend = _unpack(call)
    wanted = dict(zip(DIFFERENTIABLE, needs, strict=True))
    if problem.is_empty:
        found = {n: torch.zeros_like(getattr(inputs, n)) for n in DIFFERENTIABLE if wanted[n]}
        if wanted["sinks"]:  # with no key at all, lse is the sink itself
            found["sinks"] += d_lse.sum(dim=(0, 2)).to(found["sinks"].dtype)
    else:
        plan = choose(problem, backend)
        module = backend_module(plan.backend)
        found = module.backward(problem, inputs, plan, out, lse, d_out, d_lse, wanted)
    return tuple(
        found[name].contiguous() if wanted[name] else inputs.q.new_empty(0)
        for name in DIFFERENTIABLE
    )


def _forward_shapes(*call: Any) -> tuple[Tensor, Tensor]:
    q, v = call[0], call[2]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return like_queries(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _backward_shapes(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, needs: Sequence[bool], *call: Any
) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape) if need else d_out.new_empty(0)
        for x, need in zip(call[: len(DIFFERENTIABLE)], needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.scalars = inputs[:_TENSORS], inputs[_TENSORS:]
    ctx.save_for_backward(*output, *tensors)
    ctx.present = tuple(x is not None for x in tensors[: len(DIFFERENTIABLE)])


def _differentiate(
    ctx: Any, d_out: Tensor, d_lse: Tensor, backward: Callable[..., Any] | None = None
) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    call = (*tensors, *ctx.scalars)
    flags = ctx.needs_input_grad[: len(DIFFERENTIABLE)]
    needs = [there and bool(need) for there, need in zip(ctx.present, flags, strict=True)]
    backward = backward or torch.ops.tilewise.attention_backward
    grads = backward(d_out, d_lse, out, lse, needs, *call)
    found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return (*found, *[None] * (len(_NAMES) - len(found)))


def _refuse(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError(
        "tilewise: attention_backward has no derivative, so attention has no second derivative "
        "yet; standard_attention has"
    )


class _Eager(torch.autograd.Function):
    """The same derivative without the operator around it, which costs an eager call 90 us."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*call)
        _save(ctx, call, output)
        return output

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
        # With create_graph the operator runs, which raises if a second derivative is asked for.
        observed = torch.is_grad_enabled()
        return _differentiate(ctx, d_out, d_lse, None if observed else _backward)


_LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("tilewise::attention", _forward_shapes)
torch.library.register_fake("tilewise::attention_backward", _backward_shapes)
torch.library.register_autograd("tilewise::attention", _differentiate, setup_context=_save)
torch.library.register_autograd("tilewise::attention_backward", _refuse)
