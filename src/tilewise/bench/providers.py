"""Who can run a case: standard attention, PyTorch's own kernels, other packages, each backend.

A provider says why it is not available on this machine (``unavailable``) or cannot take a case
(``refuses``); otherwise ``attend`` gives a function of q, k, v in the layout
``[batch, heads, length, dim]``. What can be prepared once for many calls (a mask in the provider's
own form, a compiled kernel) is prepared in ``attend`` and so is not timed.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import api
from .grid import Case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], tuple[Tensor, ...]]


class Refused(ValueError):
    """The provider cannot take this case; the message says why."""


class Provider:
    """One way to run attention. Subclasses override what differs."""

    name: str
    compiles = False
    drops = False
    """Whether it takes a case with dropout."""

    def unavailable(self, device: str) -> str | None:
        """Why this machine cannot run the provider on a device type ("cpu", "cuda"), or None."""
        return None

    def refuses(self, case: Case, device: str) -> str | None:
        """Why the provider cannot take the case, as far as is known before running, or None."""
        return None

    def attend(self, case: Case, device: torch.device) -> Attend:
        """The call, with everything prepared that does not depend on q, k and v."""
        raise NotImplementedError

    def remark(self, case: Case, tensors: Tensors) -> str | None:
        """What a reader should know of how the case runs here, such as which kernel was taken."""
        return None


@dataclass(frozen=True)
class Tensors:
    """The inputs of one case; ``grad`` is the incoming gradient of ``out``."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor | None


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Standard normal inputs, the same for every provider, drawn in float32 and rounded."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(heads: int, length: int, dim: int) -> Tensor:
        shape = (case.batch, heads, length, dim)
        drawn = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(shape, generator=generator, device=device, dtype=drawn).to(dtype)

    q = draw(case.q_heads, case.q_len, case.head_dim)
    k = draw(case.kv_heads, case.kv_len, case.head_dim)
    v = draw(case.kv_heads, case.kv_len, case.v_dim)
    if not case.needs_grad:
        return Tensors(q, k, v, None)
    grad = draw(case.q_heads, case.q_len, case.v_dim)
    return Tensors(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad)


def make_step(provider: Provider, case: Case, tensors: Tensors) -> Step:
    """One repetition of a case's mode, as a function without arguments.

    It returns ``(out,)``, ``(out, dq, dk, dv)`` for ``both``, or ``(dq, dk, dv)`` for ``backward``,
    whose forward has run here, once, and is kept. Raises :class:`Refused` where the provider does.
    """
    reason = provider.refuses(case, tensors.q.device.type)
    if reason is None and case.dropout_p and not provider.drops:
        reason = f"{provider.name} is not given dropout here"
    if reason is not None:
        raise Refused(reason)
    attend = provider.attend(case, tensors.q.device)
    q, k, v, grad = tensors.q, tensors.k, tensors.v, tensors.grad

    if case.mode in ("forward", "decode"):

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(q, k, v),)

        return forward
    if case.mode == "backward":
        out = attend(q, k, v)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

        return backward

    def both() -> tuple[Tensor, ...]:
        out = attend(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))

    return both


def _only(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The output of a call that was not asked for ``lse``."""
    assert isinstance(result, Tensor)
    return result


class Standard(Provider):
    """softmax(q k^T) v as plain PyTorch operations in the inputs' dtype, scores in memory."""

    name = "standard"
    drops = True

    def attend(self, case: Case, device: torch.device) -> Attend:
        mask = case.spec.mask(case.q_len, case.kv_len, device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _only(api.standard_attention(q, k, v, mask=mask, dropout_p=case.dropout_p))

        return call


class Tilewise(Provider):
    """This library, by the backend it picks itself or by one that is named."""

    drops = True

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend
        self.name = "tilewise" if backend == "auto" else f"tilewise-{backend}"

    def attend(self, case: Case, device: torch.device) -> Attend:
        mask = case.spec.mask(case.q_len, case.kv_len, device)
        backend = self.backend
        if case.mode == "decode":
            lengths = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=device)

            def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return _only(api.decode(q, k, v, lengths=lengths, mask=mask, backend=backend))

            return step

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _only(
                api.attention(q, k, v, mask=mask, dropout_p=case.dropout_p, backend=backend)
            )

        return call

    def remark(self, case: Case, tensors: Tensors) -> str | None:
        if self.backend != "auto" or case.mode == "decode":
            return None
        mask = case.spec.mask(case.q_len, case.kv_len, tensors.q.device)
        return f"runs on {api.explain(tensors.q, tensors.k, tensors.v, mask=mask).backend}"


_SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Sdpa(Provider):
    """``scaled_dot_product_attention``: PyTorch's own choice, or one of its kernels forced.

    Causal goes in by its flag where PyTorch's start-aligned diagonal is the right one (equal
    lengths); every other mask as a dense boolean tensor, the one form that PyTorch takes. A forced
    kernel is chosen by a context manager inside the timed call, a few microseconds.
    """

    drops = True

    def __init__(self, kernel: str | None = None) -> None:
        self.kernel = kernel
        self.name = "sdpa" if kernel is None else f"sdpa-{kernel}"

    def unavailable(self, device: str) -> str | None:
        if device == "cpu" and self.kernel in ("efficient", "cudnn"):
            return f"PyTorch has no {self.kernel} attention kernel on the CPU"
        return None

    def attend(self, case: Case, device: torch.device) -> Attend:
        options = self._options(case, device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **options)

        if self.kernel is None:
            return call
        kernel = _SDPA_BACKENDS[self.kernel]

        def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return call(q, k, v)

        return self._refusing(forced)

    def remark(self, case: Case, tensors: Tensors) -> str | None:
        # The function by which PyTorch itself decides; it is not part of its documented surface.
        choose = getattr(torch, "_fused_sdp_choice", None)
        if self.kernel is not None or choose is None:
            return None
        q, k, v = tensors.q, tensors.k, tensors.v
        chosen = choose(q, k, v, **self._options(case, q.device))
        names = {backend.value: name for name, backend in _SDPA_BACKENDS.items()}
        return f"PyTorch takes its {names[chosen]} kernel" if chosen in names else None

    @staticmethod
    def _options(case: Case, device: torch.device) -> dict[str, Any]:
        causal = case.spec.is_causal and case.q_len == case.kv_len
        mask = None
        if not causal and not case.spec.is_none:
            mask = case.spec.dense(case.q_len, case.kv_len, device).contiguous()
        grouped = case.q_heads != case.kv_heads
        return {
            "attn_mask": mask,
            "is_causal": causal,
            "enable_gqa": grouped,
            "dropout_p": case.dropout_p,
        }

    @staticmethod
    def _refusing(call: Attend) -> Attend:
        """PyTorch says in warnings why a forced kernel cannot run; make that the refusal."""
        first = True

        def checked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal first
            if not first:
                return call(q, k, v)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    out = call(q, k, v)
                except RuntimeError as error:
                    if "No available kernel" not in str(error) and "No viable" not in str(error):
                        raise
                    raise Refused(_first_reason(said, str(error))) from error
            first = False
            return out

        return checked


def _first_reason(said: Sequence[warnings.WarningMessage], otherwise: str) -> str:
    """The first warning that carries a reason, without PyTorch's note on where it was raised."""
    for warning in said:
        text = str(warning.message).split(" (Triggered internally")[0].strip()
        if text and not text.endswith("not used because:"):
            return text
    return otherwise.splitlines()[0]


class Flex(Provider):
    """FlexAttention through ``torch.compile``; masks as a ``mask_mod`` and a block mask."""

    name = "flex"
    compiles = True

    def __init__(self) -> None:
        self._made: tuple[Case, torch.device, Attend] | None = None

    def unavailable(self, device: str) -> str | None:
        if device == "cuda":
            return None if find_spec("triton") else "FlexAttention on CUDA needs Triton"
        compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
        if not any(name and shutil.which(name) for name in compilers):
            return "FlexAttention on the CPU needs a C++ compiler (g++ or clang++) at run time"
        return None

    def refuses(self, case: Case, device: str) -> str | None:
        if case.needs_grad and device == "cpu":
            return "FlexAttention on the CPU has no backward"
        return None

    def attend(self, case: Case, device: torch.device) -> Attend:
        case = replace(case, mode="forward")
        if self._made is None or self._made[:2] != (case, device):
            self._made = (case, device, self._compile(case, device))
        return self._made[2]

    @staticmethod
    def _compile(case: Case, device: torch.device) -> Attend:
        from torch._functorch import config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # After eight recompilations PyTorch runs FlexAttention uncompiled, far slower.
        torch._dynamo.reset()
        config.donated_buffer = False  # a donated buffer forbids timing the backward alone
        block_mask = None
        if not case.spec.is_none:
            rule = case.spec.predicate(case.q_len, case.kv_len)
            block_mask = create_block_mask(
                rule, None, None, case.q_len, case.kv_len, device=str(device)
            )
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        grouped = case.q_heads != case.kv_heads

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped)
            return out

        return call


class _CudaPackage(Provider):
    """What xFormers and flash_attn share: an optional package that runs on CUDA alone."""

    def unavailable(self, device: str) -> str | None:
        if find_spec(self.name) is None:
            return f"{self.name} is not installed"
        if device != "cuda":
            return f"{self.name} runs on CUDA only"
        return None

    def refuses(self, case: Case, device: str) -> str | None:
        spec = case.spec
        if not (spec.is_none or spec.is_causal or spec.window is not None):
            return f"{self.name} is given none, causal and window masks here, not {case.mask!r}"
        return None


class FlashAttn(_CudaPackage):
    """The flash_attn package; it takes the transposed views of q, k and v as they are."""

    name = "flash_attn"

    def refuses(self, case: Case, device: str) -> str | None:
        if case.dtype not in ("float16", "bfloat16"):
            return f"flash_attn takes float16 and bfloat16, not {case.dtype}"
        if case.head_dim != case.v_dim:
            return "flash_attn needs v_dim equal to head_dim"
        if case.head_dim > 256:
            return f"flash_attn takes head_dim up to 256, not {case.head_dim}"
        return super().refuses(case, device)

    def attend(self, case: Case, device: torch.device) -> Attend:
        import flash_attn

        window = case.spec.window or (-1, -1)
        options = {"causal": case.spec.is_causal, "window_size": window}
        lengths = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            if case.mode == "decode":
                out = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **options)
            else:
                out = flash_attn.flash_attn_func(q, k, v, **options)
            return out.transpose(1, 2)

        return call


class Xformers(_CudaPackage):
    """xFormers' ``memory_efficient_attention``, grouped heads in its five-dimensional form."""

    name = "xformers"

    def attend(self, case: Case, device: torch.device) -> Attend:
        from xformers import ops
        from xformers.ops import fmha

        bias = None
        if case.spec.is_causal:
            bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()
        elif case.spec.window is not None:
            bias = fmha.attn_bias.LocalAttentionFromBottomRightMask(*case.spec.window)
        group = case.q_heads // case.kv_heads

        def arrange(x: Tensor, queries: bool) -> Tensor:
            if group == 1:
                return x.transpose(1, 2)
            batch, _, length, dim = x.shape
            if queries:
                return x.view(batch, case.kv_heads, group, length, dim).permute(0, 3, 1, 2, 4)
            return x[:, :, None].expand(-1, -1, group, -1, -1).permute(0, 3, 1, 2, 4)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = ops.memory_efficient_attention(
                arrange(q, True), arrange(k, False), arrange(v, False), attn_bias=bias
            )
            return out.flatten(2, -2).transpose(1, 2)

        return call


def all_providers() -> list[Provider]:
    """Every provider there is, available here or not, in the order in which tables show them."""
    from ..dispatch import BACKENDS

    return [
        Standard(),
        Sdpa(),
        *(Sdpa(kernel) for kernel in _SDPA_BACKENDS),
        Flex(),
        Xformers(),
        FlashAttn(),
        Tilewise(),
        *(Tilewise(backend) for backend in BACKENDS),
    ]


DEFAULT = ("standard", "sdpa", "flex", "xformers", "flash_attn", "tilewise")


def select(names: Sequence[str]) -> list[Provider]:
    """Providers by name, in the order asked for; ``"all"`` stands for every one."""
    known = {provider.name: provider for provider in all_providers()}
    if list(names) == ["all"]:
        return list(known.values())
    for name in names:
        if name not in known:
            raise ValueError(f"providers: got {name!r}, need some of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
