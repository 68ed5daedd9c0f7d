"""tilewise as an executor of Lightning Thunder.

``thunder.jit(model, executors=[executor, *thunder.get_default_executors()])`` replaces
``torch.nn.functional.scaled_dot_product_attention`` in the traces of ``model``, forward and
backward. ``make_executor`` makes executors with a condition of yours, so that attention is replaced
only where that pays.

A replaced call is two operators in the traces: ``tilewise_forward`` gives ``out`` and ``lse``, and
``tilewise_backward`` works out the weights again from them, tile by tile (FlashAttention-2, Dao,
2023, Algorithm 2). With dropout a third one, ``tilewise_seed``, draws the seed that both share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import masks
from ..api import attention
from ..dispatch import check_name
from .sdpa_call import Arranged, arrange

_NAMED = ("align_as", "align_to", "has_names", "refine_names", "rename", "rename_")
"""The methods of named tensors, which thunder 0.2.6 lists and PyTorch 2.13 no longer has."""

try:
    import thunder
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"thunder: {error}; tilewise.compat.thunder needs lightning-thunder "
        '(pip install "tilewise[thunder]")',
        name=error.name,
    ) from error
except AttributeError as error:
    _gone = [name for name in _NAMED if not hasattr(torch.Tensor, name)]
    raise ImportError(
        f"thunder: does not import with PyTorch {torch.__version__}: {error}. "
        f"torch.Tensor lacks {', '.join(_gone) or 'none of the methods of named tensors'}; use a "
        "PyTorch that has what thunder asks for, a newer thunder, or the stand-ins that "
        "docs/compat/thunder.md shows"
    ) from error

from thunder.core import dtypes  # noqa: E402
from thunder.core.devices import to_torch_device  # noqa: E402
from thunder.core.prims import OpTags, get_grad, put_grad, shallow_copy  # noqa: E402
from thunder.core.proxies import NumberProxy, TensorProxy, pyval  # noqa: E402
from thunder.core.trace import get_tracectx  # noqa: E402
from thunder.core.vjp_utils import disable_caching_split_forward_and_backward  # noqa: E402
from thunder.extend import OperatorExecutor, register_executor  # noqa: E402

__all__ = ["Call", "executor", "make_executor", "why_not"]


@dataclass(frozen=True)
class Call:
    """A call of ``scaled_dot_product_attention`` as far as it is known while thunder traces.

    Shapes are those of the arguments, ``[..., length, dim]``; ``mask_shape`` and ``mask_dtype`` are
    None without ``attn_mask``; a bool mask hides where it is False, a float mask is added.
    """

    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    mask_shape: tuple[int, ...] | None
    mask_dtype: torch.dtype | None
    dropout_p: float
    is_causal: bool
    scale: float | None

    @property
    def q_len(self) -> int:
        return self.query_shape[-2]

    @property
    def kv_len(self) -> int:
        return self.key_shape[-2]

    @property
    def head_dim(self) -> int:
        return self.query_shape[-1]


def make_executor(
    name: str, *, when: Callable[[Call], bool] | None = None, backend: str = "auto"
) -> Any:
    """An executor that takes the calls of attention for which ``when`` is true.

    Args:
        name: the executor's, also the first word of its operators in the traces; a Python
            identifier that no other executor has.
        when: asked about each call that tilewise can run, with a ``Call``, while thunder traces and
            more than once, so it must always answer the same. What it declines goes on to the next
            executor in the list, as if this one were not there. None takes every call.
        backend: the tilewise backend; one asked for by name runs or raises when the traced
            function runs.

    Returns:
        A registered ``thunder.extend.OperatorExecutor``, to be put before others in
        ``thunder.jit(..., executors=[...])`` or made a default with
        ``thunder.extend.add_default_executor``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. A ``when`` that does
            not answer with a bool raises when thunder traces.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    if not name.isidentifier():
        raise ValueError(f"name: got {name!r}; it must be a Python identifier")
    known = (*thunder.get_default_executors(), *thunder.get_always_executors())
    if name in _made or any(other.name == name for other in known):
        raise ValueError(f"name: {name!r} is an executor already; each needs a name of its own")
    if when is not None and not callable(when):
        raise TypeError(f"when: expected a callable or None, got {type(when).__name__}")
    check_name(backend)
    made = OperatorExecutor(name)
    operators = _Operators(made, name, backend)
    made.register_implementation(
        thunder.torch.scaled_dot_product_attention,
        checker=_checker(when),
        execution_transform=operators.execute,
        grad_transform=disable_caching_split_forward_and_backward(operators.differentiate),
    )
    _made.add(name)
    return register_executor(made)


def why_not(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
) -> str | None:
    """Why no executor of tilewise takes this call, or None if those without a condition do.

    Takes the arguments of thunder's ``scaled_dot_product_attention``: tensors, or the proxies that
    stand for them while thunder traces. Only shapes, dtypes and devices count.
    """
    found = _judge(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return found if isinstance(found, str) else None


def _judge(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any
) -> Call | str:
    """The call as ``when`` sees it, or why tilewise cannot run it."""
    tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    present = {name: x for name, x in tensors.items() if x is not None}
    for name, x in present.items():
        if any(isinstance(n, NumberProxy) for n in x.shape):
            return f"{name}: its shape is symbolic; tilewise needs cache='constant values'"
        if x.device != query.device:
            return f"{name}: device is {x.device} but query's is {query.device}"
    dropout_p, is_causal = pyval(dropout_p), pyval(is_causal)
    scale = None if scale is None else pyval(scale)
    if dropout_p is None or is_causal is None:
        return "dropout_p, is_causal: not known while tracing"
    if is_causal and attn_mask is not None:
        return "attn_mask: given together with is_causal=True; set one of them"
    try:
        call = _arranged(query, key, value, attn_mask, dropout_p, scale)
    except (TypeError, ValueError) as error:
        return str(error)
    mask = call.attn_mask
    return Call(
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        value_shape=tuple(value.shape),
        dtype=call.query.dtype,
        device=to_torch_device(query.device),
        mask_shape=None if mask is None else tuple(attn_mask.shape),
        mask_dtype=None if mask is None else mask.dtype,
        dropout_p=float(dropout_p),
        is_causal=bool(is_causal),
        scale=scale,
    )


def _arranged(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, scale: float | None
) -> Arranged:
    """``sdpa_call.arrange`` for proxies: it judges shapes and dtypes, of tensors without data."""
    stand_ins = [None if x is None else _without_data(x) for x in (query, key, value, attn_mask)]
    q, k, v, mask = stand_ins
    assert q is not None and k is not None and v is not None
    return arrange(q, k, v, mask, dropout_p, scale, False)


def _without_data(x: Any) -> Tensor:
    return torch.empty(tuple(x.shape), dtype=dtypes.to_torch_dtype(x.dtype), device="meta")


def _checker(when: Callable[[Call], bool] | None) -> Callable[..., bool]:
    def check(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: Any = 0.0,
        is_causal: Any = False,
        *,
        scale: Any = None,
    ) -> bool:
        call = _judge(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if isinstance(call, str):
            return False
        answer = True if when is None else when(call)
        if not isinstance(answer, bool):
            raise TypeError(f"when: answered {answer!r}; it must be True or False")
        return answer

    return check


class _Operators:
    """One executor's operators in traces, and what thunder writes in place of a call."""

    def __init__(self, made: Any, name: str, backend: str) -> None:
        self.backend = backend
        self.labels = itertools.count()
        self.drawn: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()
        keep = (OpTags.DONT_AUTO_RECOMPUTE_IN_BACKWARD,)
        self.seed = made.register_operator(
            f"{name}_seed", meta=_seed_shape, fn=_draw_seed, tags=(OpTags.RANDOM_OP,)
        )
        made.register_implementation(self.seed, execution_transform=self._draw_once)
        self.forward = made.register_operator(
            f"{name}_forward", meta=_forward_shapes, fn=self._forward, tags=keep
        )
        self.backward = made.register_operator(
            f"{name}_backward", meta=_backward_shapes, fn=self._backward, tags=keep
        )

    def execute(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: Any = 0.0,
        is_causal: Any = False,
        *,
        scale: Any = None,
    ) -> Any:
        """The call where no gradient is asked for."""
        seed = self._seed_of(query, dropout_p)
        return self.forward(query, key, value, attn_mask, seed, dropout_p, is_causal, scale)[0]

    def differentiate(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: Any = 0.0,
        is_causal: Any = False,
        *,
        scale: Any = None,
    ) -> Any:
        """The call and its gradients; thunder moves what only they need to the backward trace."""
        seed = self._seed_of(query, dropout_p)
        options = (seed, dropout_p, is_causal, scale)
        out, lse = self.forward(query, key, value, attn_mask, *options)
        grads = self.backward(get_grad(out), query, key, value, attn_mask, out, lse, *options)
        for x, grad in zip((query, key, value, attn_mask), grads, strict=False):
            put_grad(x, grad)
        return out

    def _seed_of(self, query: Any, dropout_p: Any) -> Any:
        # The label tells calls apart that are otherwise alike, so that no pass merges their seeds.
        return None if pyval(dropout_p) in (0, 1) else self.seed(query, next(self.labels))

    def _draw_once(self, query: Any, label: int) -> Any:
        """Where a trace computes a part twice (``torch.utils.checkpoint``), the first seed."""
        drawn = self.drawn.setdefault(get_tracectx(), {})
        if label in drawn:
            return shallow_copy(drawn[label])
        drawn[label] = self.seed(query, label)
        return drawn[label]

    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """``out [..., q_len, v_dim]`` and ``lse [..., q_len]``."""
        call = arrange(query, key, value, attn_mask, dropout_p, scale, False)
        with torch.no_grad():
            out, lse = self._attend(call, seed, dropout_p, is_causal, scale)
        return out.reshape(call.shape), lse.reshape(call.shape[:-1])

    def _backward(
        self,
        d_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        seed: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, ...]:
        """Gradients of query, key, value and of a float attn_mask, in their shapes."""
        query, key, value = leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.detach().requires_grad_()
            leaves.append(attn_mask)
        with torch.enable_grad():
            call = arrange(query, key, value, attn_mask, dropout_p, scale, False)
            rows, v_dim = call.query.shape[:3], call.value.shape[3]
            with _Remembered(out.reshape(*rows, v_dim), lse.reshape(rows)):
                again, _ = self._attend(call, seed, dropout_p, is_causal, scale)
        d_out = d_out.reshape(again.shape)
        return torch.autograd.grad(again, leaves, d_out, allow_unused=True, materialize_grads=True)

    def _attend(
        self,
        call: Arranged,
        seed: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        mask, bias = _terms(call, dropout_p, is_causal)
        return attention(
            call.query,
            call.key,
            call.value,
            mask=mask,
            bias=bias,
            scale=scale,
            dropout_p=0.0 if dropout_p == 1 else dropout_p,
            seed=seed,
            return_lse=True,
            backend=self.backend,
        )


class _Remembered(TorchDispatchMode):
    """While it is active, ``tilewise.attention`` is not computed: it is what the forward left.

    Autograd records the operator all the same, so the gradients of what it then gives are those of
    the call, from the ``out`` and ``lse`` of the forward trace, with nothing computed twice.
    """

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        super().__init__()
        self.out, self.lse = out, lse

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.tilewise.attention.default:
            return self.out.detach(), self.lse.detach()
        return func(*args, **(kwargs or {}))


def _terms(
    call: Arranged, dropout_p: float, is_causal: bool
) -> tuple[masks.Mask | None, Tensor | None]:
    """The call's mask and bias for ``tilewise.attention``."""
    if dropout_p == 1:  # everything is dropped: what no query sees
        return masks.prefix(0), None
    if is_causal:
        return masks.causal(align="start"), None
    if call.attn_mask is None or call.attn_mask.is_floating_point():
        return None, call.attn_mask
    return masks.from_bool(call.attn_mask), None


def _draw_seed(query: Tensor, label: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=query.device)


def _seed_shape(query: Any, label: int) -> Any:
    return TensorProxy(shape=(), dtype=dtypes.int64, device=query.device, requires_grad=False)


def _forward_shapes(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    seed: Any,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
) -> tuple[Any, Any]:
    shape = _arranged(query, key, value, attn_mask, dropout_p, scale).shape
    wide = dtypes.float64 if query.dtype == dtypes.float64 else dtypes.float32
    lse = TensorProxy(shape=shape[:-1], dtype=wide, device=query.device, requires_grad=False)
    return TensorProxy(like=query, shape=shape), lse


def _backward_shapes(
    d_out: Any, query: Any, key: Any, value: Any, attn_mask: Any, *rest: Any
) -> tuple[Any, ...]:
    inputs = [query, key, value]
    if attn_mask is not None and attn_mask.dtype != dtypes.bool8:
        inputs.append(attn_mask)
    return tuple(TensorProxy(like=x, shape=x.shape) for x in inputs)


_made: set[str] = set()

executor = make_executor("tilewise")
"""Takes every call that tilewise can run."""
