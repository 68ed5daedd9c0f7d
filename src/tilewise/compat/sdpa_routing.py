"""``tilewise.enable``: PyTorch's ``scaled_dot_product_attention`` on the CPU runs tilewise.

The function is one operator, ``aten::scaled_dot_product_attention``, whatever name a model imported
it by and whenever. PyTorch implements it for all devices at once by choosing between other
operators; here it gets kernels of its own for the CPU, above autograd and below. Autocast, vmap,
TorchScript and the tracers of ``torch.compile`` act before these keys and work as they did.

A kernel takes a call if ``why_not`` has no objection and hands it to PyTorch's implementation
otherwise, which is part of PyTorch under another key, so it can never come back here.
"""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from .sdpa_call import Arranged, arrange, run

_OPERATOR = torch.ops.aten.scaled_dot_product_attention.default
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)
_TRACED = (*_PLAIN, FakeTensor, FunctionalTensor)
_CACHE_TAG = "+tilewise"


class Enabled:
    """What ``enable`` returns: a context manager whose end undoes that one ``enable``."""

    def __enter__(self) -> Enabled:
        _hold(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _release(self)


_lock = threading.Lock()
_holders: set[Enabled] = set()
_library: torch.library.Library | None = None


def enable() -> Enabled:
    """``tilewise.enable``."""
    handle = Enabled()
    _hold(handle)
    return handle


def disable() -> None:
    """``tilewise.disable``."""
    _refuse_tracing("disable")
    with _lock:
        _holders.clear()
        _settle()


def _hold(handle: Enabled) -> None:
    _refuse_tracing("enable")
    with _lock:
        _holders.add(handle)
        _settle()


def _release(handle: Enabled) -> None:
    with _lock:
        _holders.discard(handle)
        _settle()


def _settle() -> None:
    """Make the dispatcher agree with whether anybody holds on; the lock is held."""
    global _library
    if bool(_holders) == (_library is not None):
        return
    if _library is None:
        library = torch.library.Library("aten", "IMPL")
        library.impl("scaled_dot_product_attention", _above_autograd, "AutogradCPU")
        library.impl("scaled_dot_product_attention", _below_autograd, "CPU")
        _library = library
    else:
        _library._destroy()
        _library = None
    _forget_traces(_library is not None)


def _forget_traces(enabled: bool) -> None:
    """What was traced before would go on running what it was traced with.

    The operator remembers in Python which kernel serves a key, and compiled functions are kept.
    """
    _OPERATOR._dispatch_cache.clear()
    _tag_compiled(enabled)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _tag_compiled(enabled: bool) -> None:
    """Keep what is compiled under ``enable`` apart in the compiler's cache on disk.

    It looks a graph up as it was before it reached the dispatcher, so the key needs a tag. Setting
    one is local to a thread; the value behind it, from the environment or the default, is not.
    """
    config: Any = torch.compiler.config
    entry = config._config["cache_key_tag"]

    def tagged(tag: str) -> str:
        tag = tag.removesuffix(_CACHE_TAG)
        return tag + _CACHE_TAG if enabled else tag

    for source in ("default", "env_value_default"):
        if isinstance(getattr(entry, source), str):
            setattr(entry, source, tagged(getattr(entry, source)))
    if isinstance(entry.user_override.get(), str):
        config.cache_key_tag = tagged(config.cache_key_tag)


def _refuse_tracing(name: str) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(f"tilewise.{name}: cannot be compiled; call it outside torch.compile")


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """Why ``enable`` leaves this call to PyTorch, or None if tilewise runs it.

    Takes what ``scaled_dot_product_attention`` takes and answers for the moment of asking: grad
    mode, transforms and modes count. The answer comes from the function that routes the calls.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.device.type != "cpu":
            return f"{name}: device is {x.device}; only calls on the CPU are routed"
    found = _judge(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return found if isinstance(found, str) else None


def _above_autograd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    call = _judge(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if isinstance(call, Arranged):
        return run(call, dropout_p, is_causal, scale)
    return _OPERATOR.decompose(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _below_autograd(*args: Any, **options: Any) -> Tensor:
    """In inference mode, and wherever autograd has had its turn: records nothing."""
    if not torch.is_grad_enabled():
        return _above_autograd(*args, **options)
    with torch.no_grad():
        return _above_autograd(*args, **options)


def _judge(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Arranged | str:
    """The call as tilewise takes it, or why PyTorch shall have it."""
    if query.dtype not in _DTYPES:
        return f"query: dtype is {query.dtype}; routed are float32, float16 and bfloat16"
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    reason = _watcher(tensors)
    if reason is not None:
        return reason
    if any(x.layout != torch.strided or 0 in x.shape for x in tensors):
        return "query: an input is sparse or has no elements"
    if attn_mask is not None and attn_mask.dim() < 2:
        return f"attn_mask: has {attn_mask.dim()} dimensions; routed are two or more"
    try:
        call = arrange(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
    except (TypeError, ValueError) as error:
        return str(error)
    if is_causal and attn_mask is not None and not call.fused:
        return "attn_mask: given together with is_causal=True, which PyTorch refuses here"
    return call


def _watcher(tensors: tuple[Tensor, ...]) -> str | None:
    """Who wants to see PyTorch's own operators, or asked for one of them; None if nobody."""
    if not torch.backends.cuda.flash_sdp_enabled():
        return "sdpa_kernel: PyTorch's fused kernels are turned off, so another one is asked for"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func: a transform is active"
    if forward_ad._current_level >= 0:
        return "torch.autograd.forward_ad: a dual level is active"
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._len_torch_dispatch_stack() > 0:
        return "torch.utils._python_dispatch: a dispatch mode is active"
    for x in tensors:
        if type(x) not in (_TRACED if compiling else _PLAIN):
            return f"query: an input is a {type(x).__name__}, a tensor subclass"
    return None
