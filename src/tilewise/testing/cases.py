"""The one case generator: every backend is tested, and checked before it is timed, on these.

A ``Case`` is a description that prints and hashes; ``make`` turns it into tensors, always the same
for the same case. ``grid`` lists every feature alone and in pairs; ``strategies`` lets hypothesis
draw the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .. import masks as m
from ..checks import FLOAT8
from ..masks import Mask
from ..tensors import out_dtype

MaskMaker = Callable[["Case", torch.Generator], Mask]


def _lengths(case: Case, generator: torch.Generator) -> Mask:
    return m.lengths(torch.randint(0, case.kv_len + 1, (case.batch,), generator=generator))


def _documents(case: Case, generator: torch.Generator) -> Mask:
    """Packed documents, other ones in each batch entry, that line up at the end."""
    most = max(case.q_len, case.kv_len)
    ids = torch.randint(0, 4, (case.batch, most), generator=generator).sort(dim=1).values
    return m.documents(ids[:, most - case.q_len :], ids[:, most - case.kv_len :])


def _scattered(case: Case, generator: torch.Generator) -> Mask:
    return m.documents(
        torch.randint(0, 3, (case.q_len,), generator=generator),
        torch.randint(0, 3, (case.kv_len,), generator=generator),
    )


def _random(case: Case, generator: torch.Generator) -> Mask:
    shape = (case.batch, case.q_heads, case.q_len, case.kv_len)
    return m.from_bool(torch.rand(shape, generator=generator) < 0.3)


def _predicate(case: Case, generator: torch.Generator) -> Mask:
    return m.from_predicate(lambda b, h, q, kv: (q + 2 * kv + b + h) % 3 != 0)


MASKS: dict[str, MaskMaker] = {
    "causal": lambda case, g: m.causal(),
    "causal_start": lambda case, g: m.causal(align="start"),
    "window": lambda case, g: m.window(5, 2),
    "sinks_window": lambda case, g: (m.prefix(3) | m.window(9, 0)) & m.causal(),
    "prefix": lambda case, g: m.prefix(7) | m.causal(),
    "lengths": _lengths,
    "padded_causal": lambda case, g: _lengths(case, g) & m.causal(),
    "documents": _documents,
    "packed_causal": lambda case, g: _documents(case, g) & m.causal(),
    "chunks": lambda case, g: m.chunks(8) & m.causal(),
    "not_causal": lambda case, g: ~m.causal(),
    "dilated": lambda case, g: m.dilated(3) & m.window(20, 20),
    "scattered": _scattered,
    "random": _random,
    "predicate": _predicate,
    "nothing": lambda case, g: m.prefix(0),
}
"""Every kind of mask, by name; ``nothing`` hides all keys."""

DESCALES = ("q_descale", "k_descale", "v_descale")
BIAS_SHAPES = ("bhqk", "hqk", "qk", "b11k", "h1k", "bhq1", "1")
LAYOUTS = ("bhsd", "bshd", "sbhd", "sliced", "transposed", "expanded")


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtype, memory layout, mask and options, and the seed of its tensors.

    ``descales`` is ``"h"``, ``"bh"`` (one per kv head, or per batch entry and kv head) or None.
    """

    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 4
    q_len: int = 37
    kv_len: int = 37
    head_dim: int = 16
    v_dim: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "bhsd"
    mask: str | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: str | None = None
    alibi: str | None = None
    relative_bias: bool = False
    sinks: bool = False
    descales: str | None = None
    dropout_p: float = 0.0
    magnitude: float = 1.0
    seed: int = 0

    def make(self, device: str | torch.device = "cpu") -> Call:
        """The tensors, drawn in float64 on the CPU and then rounded to the case's dtype."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

        def laid_out(heads: int, length: int, dim: int) -> Tensor:
            shape = (self.batch, heads, length, dim)
            if self.dtype == FLOAT8:  # has no product; its strides are those of its bytes
                x = (draw(*shape, dtype=torch.float64) * self.magnitude).to(FLOAT8)
                return in_layout(x.view(torch.uint8), self.layout).view(FLOAT8)
            return in_layout(draw(*shape) * self.magnitude, self.layout)

        q = laid_out(self.q_heads, self.q_len, self.head_dim)
        k = laid_out(self.kv_heads, self.kv_len, self.head_dim)
        v = laid_out(self.kv_heads, self.kv_len, self.v_dim)
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
        if self.mask is not None:
            options["mask"] = MASKS[self.mask](self, generator)
        own = out_dtype(self.dtype)
        wide = torch.promote_types(own, torch.float32)
        if self.bias is not None:
            options["bias"] = draw(*self._bias_shape(), dtype=own)
        if self.alibi is not None:
            shape = (self.batch, self.q_heads) if self.alibi == "bh" else (self.q_heads,)
            options["alibi"] = draw(*shape, dtype=wide).abs() * 0.3
        if self.relative_bias:
            distances = max(self.q_len + self.kv_len - 1, 0)
            options["relative_bias"] = draw(self.q_heads, distances, dtype=wide)
        if self.sinks:
            options["sinks"] = draw(self.q_heads, dtype=wide)
        if self.descales is not None:
            shape = (self.batch, self.kv_heads) if self.descales == "bh" else (self.kv_heads,)
            for name in DESCALES:
                options[name] = 0.5 + draw(*shape, dtype=torch.float32).abs()
        if self.dropout_p:
            options |= {"dropout_p": self.dropout_p, "seed": self.seed + 2**40}
        d_out = draw(self.batch, self.q_heads, self.q_len, self.v_dim, dtype=own)
        d_lse = draw(self.batch, self.q_heads, self.q_len, dtype=wide)
        return Call(self, q, k, v, options, d_out, d_lse)

    def _bias_shape(self) -> tuple[int, ...]:
        size = {"b": self.batch, "h": self.q_heads, "q": self.q_len, "k": self.kv_len, "1": 1}
        assert self.bias is not None
        return tuple(size[letter] for letter in self.bias)

    def __str__(self) -> str:
        changed = [
            f"{name}={str(value).removeprefix('torch.')}"
            for name, value in self.__dict__.items()
            if value != Case.__dataclass_fields__[name].default
        ]
        return ",".join(changed) or "plain"


@dataclass(frozen=True, eq=False)
class Call:
    """A case's tensors: inputs, keyword options, and the gradients that arrive at its outputs."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    d_out: Tensor
    d_lse: Tensor

    def differentiable(self) -> dict[str, Tensor]:
        """The floating-point tensor arguments by name."""
        found = {"q": self.q, "k": self.k, "v": self.v}
        names = ("bias", "alibi", "relative_bias", "sinks")
        return found | {name: self.options[name] for name in names if name in self.options}


@dataclass(frozen=True)
class Feature:
    """A name for a change to the plain case; two features that touch one field cannot pair."""

    name: str
    fields: dict[str, Any] = field(hash=False)


FEATURES: tuple[Feature, ...] = (
    *(Feature(f"mask:{name}", {"mask": name}) for name in MASKS),
    *(Feature(f"bias:{shape}", {"bias": shape}) for shape in BIAS_SHAPES),
    *(Feature(f"layout:{name}", {"layout": name}) for name in LAYOUTS[1:]),
    Feature("scale", {"scale": 0.7}),
    Feature("softcap", {"softcap": 2.5}),
    Feature("alibi", {"alibi": "h"}),
    Feature("alibi:bh", {"alibi": "bh"}),
    Feature("relative_bias", {"relative_bias": True}),
    Feature("sinks", {"sinks": True}),
    Feature("dropout", {"dropout_p": 0.3}),
    Feature("gqa", {"kv_heads": 2}),
    Feature("mqa", {"kv_heads": 1}),
    Feature("v_dim", {"v_dim": 9}),
    Feature("head_dim", {"head_dim": 33}),
    Feature("longer_keys", {"kv_len": 53}),
    Feature("longer_queries", {"q_len": 53}),
    Feature("one_query", {"q_len": 1}),
    Feature("one_key", {"kv_len": 1}),
)


FLOAT8_FEATURES: tuple[Feature, ...] = (
    *FEATURES,
    Feature("descales", {"descales": "h"}),
    Feature("descales:bh", {"descales": "bh"}),
)
"""Those of float8 calls."""


def grid(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Case]]:
    """The plain case, every feature alone, and every pair that touches different fields."""
    plain = Case(dtype=dtype)
    features = FLOAT8_FEATURES if dtype == FLOAT8 else FEATURES
    yield "plain", plain
    for feature in features:
        yield feature.name, replace(plain, **feature.fields)
    for a, b in combinations(features, 2):
        if not a.fields.keys() & b.fields.keys():
            yield f"{a.name}+{b.name}", replace(plain, **a.fields, **b.fields)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values ``[batch, heads, length, dim]`` with other strides."""
    if layout == "bhsd":
        return x
    if layout == "bshd":  # FlashAttention's order
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sbhd":  # Megatron's order
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if layout == "sliced":  # a slice of a fused projection: gaps between rows and between heads
        return torch.nn.functional.pad(x, (3, 2, 1, 2))[..., 1:-2, 3 : 3 + x.shape[3]]
    if layout == "transposed":  # last stride is not 1
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":  # batch entries share memory: stride 0
        return x[:1].expand(x.shape)
    raise ValueError(f"layout: got {layout!r}; it must be one of {LAYOUTS}")
