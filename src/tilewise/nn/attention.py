"""Multi-head attention as a layer: projections around ``tilewise.attention``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masks
from ..api import attention, decode
from .cache import KVCache
from .rotary import RotaryConfig, apply_rotary

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ScoreOptions(TypedDict, total=False):
    """Options of :func:`tilewise.attention` that a layer passes through as they are."""

    bias: Tensor
    scale: float
    softcap: float
    alibi: Tensor
    relative_bias: Tensor
    sinks: Tensor


class FlashMultiHeadAttention(nn.Module):
    """Multi-head attention without the score matrix: O(length) memory, any tilewise mask.

    Parameters carry the names and layout of :class:`torch.nn.MultiheadAttention`
    (``in_proj_weight``, ``in_proj_bias``, ``out_proj.weight``, ``out_proj.bias``), so a state dict
    of one loads into the other; :meth:`from_torch` and :meth:`to_torch` convert whole modules.
    Tensors are always batch-first.

    Args:
        embed_dim: width of the input and the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``; fewer than ``num_heads`` is
            grouped-query attention, 1 is multi-query attention. None for ``num_heads``.
        head_dim: channels of each head; None for ``embed_dim // num_heads``.
        bias: whether both projections add a bias.
        dropout: probability of dropping an attention weight, in training mode only.
        rotary: True, or a :class:`RotaryConfig`, to turn queries and keys by their positions.
        causal: whether a query sees only the keys up to its own position.
        backend: which implementation runs, as in :func:`tilewise.attention`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range, or the head counts do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        rotary: bool | RotaryConfig = False,
        causal: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        if head_dim is not None:
            sizes["head_dim"] = head_dim
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"{name} must be positive, got {size}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}; set head_dim"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.dropout = dropout
        self.rotary = RotaryConfig() if rotary is True else (rotary or None)
        if self.rotary is not None:
            self.rotary.channels(self.head_dim)
        self.causal = causal
        self.backend = backend

        self._q_width = num_heads * self.head_dim
        width = self._q_width + 2 * num_kv_heads * self.head_dim
        self.in_proj_weight = nn.Parameter(
            torch.empty(width, embed_dim, device=device, dtype=dtype)
        )
        self.in_proj_bias = (
            nn.Parameter(torch.empty(width, device=device, dtype=dtype)) if bias else None
        )
        self.out_proj = nn.Linear(self._q_width, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as :class:`torch.nn.MultiheadAttention` does: Xavier weights, zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KVCache | None = None,
        *,
        mask: masks.Mask | Tensor | None = None,
        cache: KVCache | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Tensor:
        """Attend from ``x`` to itself, to ``context``, or to what ``cache`` holds.

        Args:
            x: ``[batch, length, embed_dim]``.
            context: cross-attention: keys and values come from this tensor ``[batch,
                context_length, embed_dim]``, or from what :meth:`project_context` made of it.
            mask: which keys each query may see, a :mod:`tilewise.masks` mask or a bool tensor (True
                means attend); a causal module takes the intersection with its own.
            cache: generation: the keys and values of ``x`` are appended, and ``x`` attends to all
                that the cache then holds. Runs under ``torch.no_grad()`` only.
            options: ``bias``, ``scale``, ``softcap``, ``alibi``, ``relative_bias``, ``sinks``, as
                in :func:`tilewise.attention`.

        Returns:
            ``[batch, length, embed_dim]`` in x's dtype.

        Raises:
            ValueError: a shape does not fit, or the arguments contradict each other.
            TypeError: an option is unknown.
        """
        self._check(x, context, cache, options)
        if context is None:
            kv = self.num_kv_heads
            q, k, v = self._project(x, slice(None), (self.num_heads, kv, kv))
            if self.rotary is not None:
                count = x.shape[1]
                positions = (
                    cache.positions(count) if cache else torch.arange(count, device=x.device)
                )
                q = apply_rotary(q, positions, self.rotary)
                k = apply_rotary(k, positions, self.rotary)
        else:
            (q,) = self._project(x, slice(None, self._q_width), (self.num_heads,))
            if isinstance(context, Tensor):
                k, v = self._project_kv(context)
            else:
                cache = context
        if cache is None:
            out = self._attend(q, k, v, mask, options)
        else:
            if context is None:
                cache.append(k, v)
            out = self._attend_cached(q, cache, mask, options)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def project_context(self, context: Tensor, lengths: Tensor | None = None) -> KVCache:
        """Keys and values of ``context`` ``[batch, length, embed_dim]``, computed once.

        Pass the result as ``context`` to generate many tokens against one encoder output.
        ``lengths`` ``[batch]`` leaves the padding of shorter contexts out.
        """
        self._check_width("context", context)
        with torch.no_grad():
            k, v = self._project_kv(context)
            projected = KVCache(torch.empty_like(k), torch.empty_like(v))
            projected.append(k, v)
        if lengths is not None:
            projected.truncate(lengths)
        return projected

    def allocate_cache(
        self, batch: int, max_len: int, *, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty :class:`KVCache` of this layer's heads and device; ``dtype`` as the weights'."""
        weight = self.in_proj_weight
        return KVCache.allocate(
            batch,
            self.num_kv_heads,
            max_len,
            self.head_dim,
            device=weight.device,
            dtype=dtype or weight.dtype,
        )

    @classmethod
    def from_torch(
        cls,
        module: nn.MultiheadAttention,
        *,
        causal: bool = False,
        backend: str = "auto",
    ) -> FlashMultiHeadAttention:
        """A copy of ``module`` with its weights, dropout, device, dtype and mode.

        ``batch_first`` concerns the tensors of a call, not the weights: the result is batch-first
        either way. PyTorch names the mask in each call; here ``causal`` may be fixed for good.

        Raises:
            ValueError: the module has ``kdim`` or ``vdim`` other than ``embed_dim``,
                ``add_bias_kv`` or ``add_zero_attn``, which this layer has no counterpart for.
        """
        if module.in_proj_weight is None:
            raise ValueError(
                f"kdim and vdim must equal embed_dim {module.embed_dim}, "
                f"got kdim={module.kdim}, vdim={module.vdim}"
            )
        for name, present in (
            ("add_bias_kv", module.bias_k is not None),
            ("add_zero_attn", module.add_zero_attn),
        ):
            if present:
                raise ValueError(f"a torch.nn.MultiheadAttention with {name}=True cannot be loaded")
        flash = cls(
            module.embed_dim,
            module.num_heads,
            bias=module.in_proj_bias is not None,
            dropout=module.dropout,
            causal=causal,
            backend=backend,
            device=module.in_proj_weight.device,
            dtype=module.in_proj_weight.dtype,
        )
        flash.load_state_dict(module.state_dict())
        return flash.train(module.training)

    def to_torch(self, *, batch_first: bool = True) -> nn.MultiheadAttention:
        """A :class:`torch.nn.MultiheadAttention` with these weights, dropout and mode.

        ``causal`` has no place in that module: pass ``attn_mask`` and ``is_causal`` to its calls.

        Raises:
            ValueError: grouped-query heads, a free ``head_dim`` or rotary positions, which
                ``torch.nn.MultiheadAttention`` cannot express.
        """
        for trouble, present in (
            (f"num_kv_heads={self.num_kv_heads}", self.num_kv_heads != self.num_heads),
            (f"head_dim={self.head_dim}", self._q_width != self.embed_dim),
            ("rotary positions", self.rotary is not None),
        ):
            if present:
                raise ValueError(f"torch.nn.MultiheadAttention cannot express {trouble}")
        module = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.in_proj_bias is not None,
            batch_first=batch_first,
            device=self.in_proj_weight.device,
            dtype=self.in_proj_weight.dtype,
        )
        module.load_state_dict(self.state_dict())
        return module.train(self.training)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: masks.Mask | Tensor | None,
        options: ScoreOptions,
    ) -> Tensor:
        return attention(
            q,
            k,
            v,
            mask=self._visible(mask),
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
            **options,
        )

    def _attend_cached(
        self,
        q: Tensor,
        cache: KVCache,
        mask: masks.Mask | Tensor | None,
        options: ScoreOptions,
    ) -> Tensor:
        return decode(
            q,
            cache.k,
            cache.v,
            lengths=cache.lengths,
            mask=self._visible(mask),
            backend=self.backend,
            **options,
        )

    def _visible(self, mask: masks.Mask | Tensor | None) -> masks.Mask | None:
        if isinstance(mask, Tensor):
            mask = masks.from_bool(mask)
        if not self.causal:
            return mask
        return masks.causal() if mask is None else masks.causal() & mask

    def _project(self, x: Tensor, rows: slice, heads: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Some rows of the fused projection, as ``[batch, heads, length, head_dim]`` views."""
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        packed = F.linear(x, self.in_proj_weight[rows], bias)
        return packed.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(heads, dim=1)

    def _project_kv(self, context: Tensor) -> tuple[Tensor, ...]:
        heads = (self.num_kv_heads, self.num_kv_heads)
        return self._project(context, slice(self._q_width, None), heads)

    def _check_width(self, name: str, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(
                f"{name} must be [batch, length, embed_dim={self.embed_dim}], got {list(x.shape)}"
            )

    def _check(
        self,
        x: Tensor,
        context: Tensor | KVCache | None,
        cache: KVCache | None,
        options: ScoreOptions,
    ) -> None:
        self._check_width("x", x)
        unknown: set[str] = set(options) - set(ScoreOptions.__annotations__)
        if unknown:
            raise TypeError(
                f"unknown option {', '.join(sorted(unknown))}; "
                f"the options are {', '.join(ScoreOptions.__annotations__)}"
            )
        if context is not None:
            if isinstance(context, Tensor):
                self._check_width("context", context)
            if cache is not None:
                raise ValueError(
                    "cache belongs to self-attention; for cross-attention pass "
                    "context=module.project_context(context)"
                )
            if self.causal or self.rotary is not None:
                what = "causal=True" if self.causal else "rotary positions"
                raise ValueError(
                    f"{what} is for self-attention: queries and context share no positions"
                )
        reads_cache = cache is not None or isinstance(context, KVCache)
        if reads_cache and self.training and self.dropout:
            raise ValueError("cached attention applies no dropout; call eval() on the module first")

    def extra_repr(self) -> str:
        parts: dict[str, Any] = {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "dropout": self.dropout,
            "causal": self.causal,
            "backend": self.backend,
        }
        if self.rotary is not None:
            parts["rotary"] = self.rotary
        described = ", ".join(f"{name}={value!r}" for name, value in parts.items())
        return f"{self.embed_dim}, {self.num_heads}, {described}"
