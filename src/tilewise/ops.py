"""The operators that PyTorch sees: schemas, shapes for tracing, and the derivative's wiring.

``tilewise::attention`` and ``tilewise::attention_backward`` are opaque to ``torch.compile``, which
traces them whole (``fullgraph=True``). The backend is chosen inside, when shapes are real numbers,
by the same function that ``explain`` asks. Where nobody looks on, an eager call runs the operator's
body directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import FLOAT8, refuse_gradient
from .dispatch import backend_module, choose
from .problem import DIFFERENTIABLE, Inputs, Plan, Problem
from .tensors import like_queries
from .tiles import Band, Bitmap, Ranges, flatten, unflatten

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi, Tensor? relative_bias, "
    "Tensor? sinks, Tensor? seed, Tensor? position, Tensor? page_table, Tensor? qk_descale, "
    "Tensor? v_descale, Tensor? mask_first, Tensor? mask_second, str mask_kind, SymInt mask_low, "
    "SymInt mask_high, float scale, float softcap, float dropout_p, SymInt relative_zero, "
    "bool needs_grad, str backend"
)
_NAMES = [argument.split()[-1] for argument in _CALL.split(",")]
_TENSORS = _NAMES.index("mask_kind")
"""How many of the arguments are tensors; they come first."""
_SCALARS = _NAMES[_NAMES.index("scale") : _NAMES.index("backend")]
"""The arguments that ``Problem`` has under the same name."""
_LIBRARY = torch.library.Library("tilewise", "DEF")
_LIBRARY.define(f"attention({_CALL}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    f"attention_backward(Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, bool[] needs, {_CALL})"
    f" -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attention(inputs: Inputs, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of a call whose arguments have been checked; differentiable.

    Nobody watches it (``is_observed``): the operator's body runs directly.
    """
    if problem.needs_grad:
        q, k, v, _, bias, alibi, relative_bias, sinks = inputs[:8]
        plan = choose(problem, backend)
        return _apply_eager(inputs, problem, plan, q, k, v, bias, alibi, relative_bias, sinks)
    return _run_forward(inputs, problem, choose(problem, backend))


def observed_attention(
    inputs: Inputs,
    *,
    scale: float,
    softcap: float,
    dropout_p: float,
    relative_zero: int,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The same through the operator, for who has to see one."""
    scalars = (scale, softcap, dropout_p, relative_zero, needs_grad, backend)
    return torch.ops.tilewise.attention(*_pack(inputs), *scalars)


def needs_grad(inputs: Inputs) -> bool:
    """Whether autograd has to record the call; what has no derivative is refused here."""
    if not torch.is_grad_enabled():
        return False
    q, k, v, _, bias, alibi, relative_bias, sinks = inputs[:8]
    wanted = (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (alibi is not None and alibi.requires_grad)
        or (relative_bias is not None and relative_bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )
    if wanted and q.dtype == FLOAT8:
        present = {name: getattr(inputs, name) for name in DIFFERENTIABLE}
        refuse_gradient({name: x for name, x in present.items() if x is not None})
    return wanted


def is_observed(inputs: Inputs) -> bool:
    """Whether something other than eager autograd has to see an operator: a compiler, a tracer, a
    dispatch mode, a tensor subclass, a functorch transform."""
    return (
        torch.compiler.is_compiling()
        or not _EAGER_TYPES.issuperset(map(type, inputs))
        or _dispatch_modes() > 0
        or _functorch_transform() is not None
    )


_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_transform = torch._C._functorch.peek_interpreter_stack
_EAGER_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None), Band, Ranges, Bitmap))
"""What the fields of ``Inputs`` are when no tensor is of a subclass."""


def _pack(inputs: Inputs) -> tuple[Any, ...]:
    """The tensors of a call and its mask, in the order of the operators' schemas."""
    q, k, v, mask, *options = inputs
    return (q, k, v, *options, *flatten(mask))


def _unpack(call: Sequence[Any]) -> tuple[Inputs, Problem, str]:
    """The arguments of a call, in the order of its schema, as the house's own objects."""
    scalars, backend = call[_TENSORS + 3 : -1], call[-1]
    k, page_table = call[1], call[9]
    kv_len = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[1]
    inputs = _inputs(call[: _TENSORS + 3], kv_len)
    return inputs, Problem.of(inputs, **dict(zip(_SCALARS, scalars, strict=True))), backend


def _inputs(packed: Sequence[Any], kv_len: int) -> Inputs:
    """The inverse of ``_pack``."""
    q, k, v, *options, first, second, kind, low, high = packed
    mask = unflatten(first, second, kind, low, high, q.shape[2], kv_len)
    return Inputs(q, k, v, mask, *options)


def _run_forward(inputs: Inputs, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
    if problem.is_empty:
        out = like_queries(inputs.q, problem.v_dim).zero_()
        lse = inputs.q.new_full(out.shape[:3], -torch.inf, dtype=problem.compute_dtype)
        return out, lse if inputs.sinks is None else lse.copy_(inputs.sinks.view(1, -1, 1))
    return backend_module(plan.backend).forward(problem, inputs, plan)


def _run_backward(
    inputs: Inputs,
    problem: Problem,
    plan: Plan,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    if problem.is_empty:
        found = {n: torch.zeros_like(getattr(inputs, n)) for n in DIFFERENTIABLE if needs[n]}
        if needs["sinks"] and d_lse is not None:  # with no key at all, lse is the sink itself
            found["sinks"] += d_lse.sum(dim=(0, 2)).to(found["sinks"].dtype)
        return found
    module = backend_module(plan.backend)
    return module.backward(problem, inputs, plan, out, lse, d_out, d_lse, needs)


def _forward(*call: Any) -> tuple[Tensor, Tensor]:
    inputs, problem, backend = _unpack(call)
    return _run_forward(inputs, problem, choose(problem, backend))


def _backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, needs: Sequence[bool], *call: Any
) -> tuple[Tensor, ...]:
    wanted = dict(zip(DIFFERENTIABLE, needs, strict=True))
    inputs, problem, backend = _unpack(call)
    plan = choose(problem, backend)
    found = _run_backward(inputs, problem, plan, out, lse, d_out, d_lse, wanted)
    return tuple(
        found[name].contiguous() if wanted[name] else d_out.new_empty(0) for name in DIFFERENTIABLE
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


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    flags = ctx.needs_input_grad[: len(DIFFERENTIABLE)]
    needs = [there and bool(need) for there, need in zip(ctx.present, flags, strict=True)]
    call = (*tensors, *ctx.scalars)
    grads = torch.ops.tilewise.attention_backward(d_out, d_lse, out, lse, needs, *call)
    found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return (*found, *[None] * (len(_NAMES) - len(found)))


def _refuse(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError(
        "tilewise: attention_backward has no derivative, so attention has no second derivative "
        "yet; standard_attention has"
    )


class _Eager(torch.autograd.Function):
    """The same derivative without the operator around it, which costs an eager call 90 us.

    ``leaves`` are the ``DIFFERENTIABLE`` of ``inputs``, for autograd to find.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Inputs, problem: Problem, plan: Plan, *leaves: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = _run_forward(inputs, problem, plan)
        q, k, v, mask, *options = inputs
        if isinstance(mask, Band):  # which has no tensor to save
            ctx.save_for_backward(out, lse, q, k, v, *options)
            ctx.call = problem, plan, mask
        else:
            first, second, kind, *_ = flatten(mask)
            ctx.save_for_backward(out, lse, q, k, v, *options, first, second)
            ctx.call = problem, plan, kind
        ctx.set_materialize_grads(False)  # an output that is not used costs no zeros
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        out, lse, q, k, v, *options = ctx.saved_tensors
        problem, plan, mask = ctx.call
        if not isinstance(mask, Band):
            *options, first, second = options
            mask = unflatten(first, second, mask, 0, 0, problem.q_len, problem.kv_len)
        inputs = Inputs(q, k, v, mask, *options)
        needs = dict(zip(DIFFERENTIABLE, ctx.needs_input_grad[3:], strict=True))
        if d_out is None:
            d_out = torch.zeros_like(out)
        if torch.is_grad_enabled():
            # create_graph: the operator runs, and raises if a second derivative is asked for.
            d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
            scalars = (getattr(problem, name) for name in _SCALARS)
            call = (*_pack(inputs), *scalars, plan.backend)
            grads = torch.ops.tilewise.attention_backward(
                d_out, d_lse, out, lse, list(needs.values()), *call
            )
            return (
                None,
                None,
                None,
                *[g if needs[n] else None for n, g in zip(needs, grads, strict=True)],
            )
        found = _run_backward(inputs, problem, plan, out, lse, d_out, d_lse, needs)
        return (None, None, None, *map(found.get, DIFFERENTIABLE))


_apply_eager = super(torch.autograd.Function, _Eager).apply
"""``_Eager.apply`` less its search for functorch's transforms, of which there are none here."""

_LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("tilewise::attention", _forward_shapes)
torch.library.register_fake("tilewise::attention_backward", _backward_shapes)
torch.library.register_autograd("tilewise::attention", _differentiate, setup_context=_save)
torch.library.register_autograd("tilewise::attention_backward", _refuse)
