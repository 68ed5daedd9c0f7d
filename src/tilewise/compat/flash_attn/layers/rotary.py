"""``flash_attn.layers.rotary``: rotary position embeddings (Su et al., 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..options import check_layout, check_size, lengths_of

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turn the first ``2 * cos.shape[-1]`` channels of x by its positions.

    Args:
        x: ``(batch, seqlen, heads, headdim)``, or ``(total, heads, headdim)`` with ``cu_seqlens``.
        cos: ``(seqlen_rotary, rotary_dim / 2)``, row n for position n.
        sin: the same.
        interleaved: pairs are channels 0 and 1, 2 and 3, ... (GPT-J); otherwise channel c of the
            first half and of the second (GPT-NeoX).
        inplace: write into x and return it.
        seqlen_offsets: position of the first token, an int or int ``(batch,)``.
        cu_seqlens: ``(batch + 1,)``, where packed sequences begin.
        max_seqlen: not needed here; a bound that the peer sizes its launch with.

    Returns:
        The shape and dtype of x; computed in float32 or better; differentiable.

    Raises:
        ValueError: a shape does not fit, or a position lies beyond the table.
    """
    if cu_seqlens is None:
        x = check_layout("x", x, "(batch, seqlen, heads, headdim)")
        batch = x.shape[0]
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        positions = positions + _offsets(seqlen_offsets, batch, x.device).unsqueeze(1)
    else:
        x = check_layout("x", x, "(total, heads, headdim)")
        lengths = lengths_of(cu_seqlens)
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
        check_size("x", x, 0, sequence.shape[0], "the end of cu_seqlens")
        shift = _offsets(seqlen_offsets, len(lengths), x.device) - cu_seqlens[:-1].long()
        positions = torch.arange(x.shape[0], device=x.device) + shift.expand(len(lengths))[sequence]
    turned = rotate(x, *look_up(cos, sin, positions, x.shape[-1]), interleaved)
    return x.copy_(turned) if inplace else turned


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """As ``apply_rotary_emb`` from position 0, with tables ``([batch,] seqlen, rotary_dim / 2)``
    that are exactly as long as x."""
    x = check_layout("x", x, "(batch, seqlen, heads, headdim)")
    check_size("cos", cos, -2, x.shape[1], "the length of x")
    return rotate(x, cos, sin, interleaved)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turn q and k within ``qkv`` in place and return it.

    ``qkv`` is ``(batch, seqlen, 3, heads, headdim)``, or with ``num_heads_q``
    ``(batch, seqlen, num_heads_q + 2 * num_heads_k, headdim)``. ``cos_k`` and ``sin_k`` are k's own
    tables (XPos); default q's.
    """
    if qkv.dim() == 5:
        check_size("qkv", qkv, 2, 3, "one each for q, k and v")
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        check_layout("qkv", qkv, "(batch, seqlen, num_heads_q + 2 * num_heads_k, headdim)")
        if num_heads_q is None or num_heads_q > qkv.shape[2] or (qkv.shape[2] - num_heads_q) % 2:
            raise ValueError(
                f"num_heads_q: got {num_heads_q}; it must leave an even number of qkv's "
                f"{qkv.shape[2]} heads for k and v"
            )
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]
    if (cos_k is None) != (sin_k is None):
        raise ValueError("cos_k, sin_k: k's own tables come together or not at all")
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    cos_k, sin_k = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
    apply_rotary_emb(k, cos_k, sin_k, interleaved, True, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Turn k within ``kv (batch, seqlen, 2, heads, headdim)`` in place and return it."""
    kv = check_layout("kv", kv, "(batch, seqlen, 2, heads, headdim)")
    check_size("kv", kv, 2, 2, "one each for k and v")
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(nn.Module):
    """Rotary embeddings with tables of cos and sin that grow as they are needed.

    Args:
        dim: how many channels of each head turn.
        base: pair p turns by ``base ** (-2p / dim)`` radians a position.
        interleaved: which channels make a pair, as in ``apply_rotary_emb``.
        scale_base: XPos (Sun et al., 2022, arXiv:2212.10554): the weight of a key falls with its
            distance; 512 is usual, None is plain rotary.
        device: of the table of frequencies.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base = dim, float(base)
        self.interleaved, self.scale_base = interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turn q and k in place.

        Args:
            qkv: packed as ``apply_rotary_emb_qkv_`` takes it; with ``kv`` just q
                ``(batch, seqlen, heads, headdim)``.
            kv: ``(batch, seqlen, 2, heads_k, headdim)``.
            seqlen_offset: position of the first token, an int or int ``(batch,)``.
            max_seqlen: how long the tables must be; a tensor offset is read for it if missing.
            num_heads_q: query heads of a four-dimensional ``qkv``.

        Returns:
            ``qkv``, or ``(q, kv)``.
        """
        if max_seqlen is None:
            furthest = seqlen_offset
            if isinstance(furthest, Tensor):
                furthest = int(furthest.max()) if furthest.numel() else 0
            max_seqlen = qkv.shape[1] + furthest
        self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin, cos_k, sin_k = self._tables()
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)

    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cos and sin for queries, then for keys."""
        cos, sin, cos_k, sin_k = (
            self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        )  # fmt: skip
        assert cos is not None and sin is not None
        return cos, sin, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        pair = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (pair / self.dim)

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor:
        """XPos's zeta, equation 14, with its gamma of 0.4."""
        pair = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (pair + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the tables long enough, on the device and in the dtype asked for."""
        old = self._cos_cached
        if (
            old is not None
            and seqlen <= self._seq_len_cached
            and old.device == device
            and old.dtype == dtype
            and not (self.training and old.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        # Angles in float32 whatever the model's dtype: in bfloat16 positions above 256 collide.
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        inv_freq = self.inv_freq
        if inv_freq.dtype != torch.float32 or inv_freq.device != position.device:
            inv_freq = self._compute_inv_freq(device)
        angle = torch.outer(position, inv_freq)
        cos, sin = angle.cos(), angle.sin()
        if self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (position - seqlen // 2) / self.scale_base
        scale = self._compute_scale(device) ** power.unsqueeze(1)
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x ``[..., heads, headdim]`` turned by cos and sin ``[..., rotary_dim / 2]`` of its tokens."""
    dim = 2 * cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(wide).unsqueeze(-2) for table in (cos, sin))
    turning, still = x[..., :dim].to(wide), x[..., dim:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning[..., : dim // 2], turning[..., dim // 2 :]
    pairs = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat((turned.to(x.dtype), still), dim=-1)


def look_up(
    cos: Tensor, sin: Tensor, positions: Tensor, head_dim: int, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    """The rows of the tables ``(seqlen_rotary, rotary_dim / 2)`` for int ``positions``.

    ``prefix`` goes before "cos" and "sin" in errors.
    """
    for name, table in ((f"{prefix}cos", cos), (f"{prefix}sin", sin)):
        check_layout(name, table, "(seqlen_rotary, rotary_dim / 2)")
        if not table.is_floating_point():
            raise TypeError(f"{name}: dtype is {table.dtype}; it must be a float dtype")
        if 2 * table.shape[1] > head_dim:
            raise ValueError(f"{name}: turns {2 * table.shape[1]} channels of a head of {head_dim}")
    if cos.shape != sin.shape:
        raise ValueError(f"{prefix}sin: shape is {list(sin.shape)} but cos's is {list(cos.shape)}")
    if not torch.compiler.is_compiling() and positions.numel():
        first, last = int(positions.min()), int(positions.max())
        if first < 0 or last >= cos.shape[0]:
            raise ValueError(
                f"{prefix}cos: has {cos.shape[0]} positions but {first} to {last} are asked for"
            )
    return cos[positions], sin[positions]


def _offsets(offsets: object, batch: int, device: torch.device) -> Tensor:
    """``seqlen_offsets`` as int64, ``(1,)`` or ``(batch,)``."""
    if isinstance(offsets, Tensor):
        if offsets.is_floating_point() or tuple(offsets.shape) != (batch,):
            raise ValueError(
                f"seqlen_offsets: must be an int or an int tensor of shape [{batch}], got "
                f"{offsets.dtype} {list(offsets.shape)}"
            )
        return offsets.to(device=device, dtype=torch.int64)
    if isinstance(offsets, bool) or not isinstance(offsets, int):
        raise TypeError(f"seqlen_offsets: must be an int or an int tensor, got {offsets!r}")
    return torch.full((1,), offsets, dtype=torch.int64, device=device)
