"""Attention in float64, entry by entry: what every result is measured against.

Written to be obviously right and to share nothing with the backends: each (query, key) pair gets
its own copy of the key and value, zero where the pair is masked, so nothing can leak, and autograd
supplies the gradients. Memory is O(q_len * kv_len * head_dim): small problems only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..frame import Frame
from ..masks import from_bool
from ..philox import dropout_keep
from .cases import Call


class Result(NamedTuple):
    """Outputs and gradients by name: ``out``, ``lse``, ``d_q``, ``d_k``, ``d_v``, ``d_bias``..."""

    tensors: dict[str, Tensor]
    magnitudes: dict[str, float]
    """For each, the largest sum of the absolute values of the terms that it is a sum of."""
    largest_exponent: float
    """max(score, |lse|), a score being the sum of its absolute terms: an exponent is off by as many
    roundings as it is large, and ``exp`` turns that into a relative error."""


def visibility(call: Call) -> Tensor:
    """bool ``[batch, q_heads, q_len, kv_len]``, from the masks' own entry-wise definition."""
    q, k = call.q, call.k
    frame = Frame.plain(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    shape = (*q.shape[:3], k.shape[2])
    mask = call.options.get("mask")
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=q.device)
    mask = from_bool(mask) if isinstance(mask, Tensor) else mask
    return mask.contains(frame.entries(0, frame.q_len)).expand(shape)


def widened(call: Call) -> dict[str, Tensor]:
    """The differentiable tensors in float64, q, k and v multiplied by their descales."""
    x = {name: tensor.detach().double() for name, tensor in call.differentiable().items()}
    for name in "qkv":
        descale = call.options.get(f"{name}_descale")
        if descale is not None:
            group = x[name].shape[1] // descale.shape[-1]
            factor = descale.double().view(-1, descale.shape[-1]).repeat_interleave(group, 1)
            x[name] = x[name] * factor[:, :, None, None]
    return x


def forward(call: Call, x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``lse``, the weights before dropout, and the scores, of float64 tensors ``x``."""
    q, k, v = x["q"], x["k"], x["v"]
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    visible = visibility(call)
    pair = visible.unsqueeze(-1)
    keys = torch.where(pair, k.repeat_interleave(group, 1).unsqueeze(2), 0)
    values = torch.where(pair, v.repeat_interleave(group, 1).unsqueeze(2), 0)
    scale = call.options.get("scale")
    scores = (q.unsqueeze(3) * keys).sum(-1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap := call.options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    if "bias" in x:
        scores = scores + torch.where(visible, x["bias"], 0)
    apart = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    apart = (apart - (k.shape[2] - q.shape[2])).to(q.device)
    if "alibi" in x:
        scores = scores - x["alibi"].view(-1, q.shape[1], 1, 1) * apart.abs()
    if "relative_bias" in x:
        scores = scores + x["relative_bias"][:, apart + k.shape[2] - 1]
    hidden = torch.where(visible, scores, -torch.inf)
    logits = hidden
    if "sinks" in x:
        sink = x["sinks"].view(1, -1, 1, 1).expand(*q.shape[:3], 1)
        logits = torch.cat([hidden, sink], dim=-1)
    empty = torch.isneginf(logits).all(-1) if logits.shape[-1] else torch.ones(q.shape[:3]).bool()
    safe = torch.where(empty.unsqueeze(-1), 0, logits)
    log_sum = torch.logsumexp(safe, -1) if logits.shape[-1] else torch.zeros_like(q[..., 0])
    lse = torch.where(empty, -torch.inf, log_sum)
    weights = torch.where(
        visible & ~empty.unsqueeze(-1), torch.exp(hidden - log_sum.unsqueeze(-1)), 0
    )
    dropped = weights
    if p := call.options.get("dropout_p", 0.0):
        batch, heads = torch.arange(q.shape[0]), torch.arange(q.shape[1])
        seed = torch.tensor(call.options["seed"])
        keep = dropout_keep(seed, batch, heads, (0, q.shape[2]), (0, k.shape[2]), p)
        dropped = weights * keep / (1 - p)
    return (dropped.unsqueeze(-1) * values).sum(3), lse, weights, scores


def run(call: Call) -> Result:
    """Outputs, gradients and their magnitudes in float64."""
    x = {name: tensor.requires_grad_() for name, tensor in widened(call).items()}
    out, lse, weights, _ = forward(call, x)
    d_out = call.d_out.double()
    d_lse = torch.where(torch.isneginf(lse), 0, call.d_lse.double())
    safe_lse = torch.where(torch.isneginf(lse), 0, lse)
    loss = (out * d_out).sum() + (safe_lse * d_lse).sum()
    grads = torch.autograd.grad(loss, list(x.values()), allow_unused=True)
    tensors = {"out": out.detach(), "lse": lse.detach()}
    for (name, tensor), grad in zip(x.items(), grads, strict=True):
        tensors[f"d_{name}"] = torch.zeros_like(tensor) if grad is None else grad
    with torch.no_grad():
        magnitudes = _magnitudes(call, x, out, weights, d_out, d_lse)
        sizes = _score_sizes(call, x)
        exponents = [sizes.masked_fill(~visibility(call), 0), safe_lse.abs()]
        largest = max((float(e.max()) for e in exponents if e.numel()), default=0.0)
    return Result(tensors, magnitudes, largest)


def _score_sizes(call: Call, x: dict[str, Tensor]) -> Tensor:
    """Scores with every term replaced by its absolute value, before any softcap."""
    absolute = {name: tensor.abs() for name, tensor in x.items() if name != "sinks"}
    if "alibi" in absolute:
        absolute["alibi"] = -absolute["alibi"]
    scale = call.options.get("scale")
    options = call.options | {"softcap": None, "scale": None if scale is None else abs(scale)}
    return forward(replace(call, options=options), absolute)[3]


def _magnitudes(
    call: Call, x: dict[str, Tensor], out: Tensor, weights: Tensor, d_out: Tensor, d_lse: Tensor
) -> dict[str, float]:
    """Sums of absolute terms: what roundings are relative to where the terms cancel."""
    group = x["q"].shape[1] // max(x["k"].shape[1], 1)
    shared = x["k"].shape[:2]
    keys, values = (x[n].abs().repeat_interleave(group, 1) for n in ("k", "v"))
    scale = call.options.get("scale")
    scale = x["q"].shape[-1] ** -0.5 if scale is None else abs(scale)
    kept = 1 / (1 - call.options.get("dropout_p", 0.0))
    delta = (d_out * out).abs().sum(-1, keepdim=True) + d_lse.abs().unsqueeze(-1)
    d_weights = kept * (d_out.abs() @ torch.nan_to_num(values).mT)
    d_scores = weights * (d_weights + delta)

    def per_kv_head(y: Tensor) -> Tensor:
        return y.unflatten(1, (shared[1], group)).sum(2) if y.numel() else y

    sums = {
        "out": kept * weights @ torch.nan_to_num(values),
        "lse": torch.ones(1, dtype=torch.float64),
        "d_q": scale * d_scores @ torch.nan_to_num(keys),
        "d_k": per_kv_head(scale * d_scores.mT @ torch.nan_to_num(x["q"].abs())),
        "d_v": per_kv_head(kept * weights.mT @ d_out.abs()),
    }
    total = d_scores.sum(dim=(0, 2)).sum(-1)
    sums["d_bias"] = d_scores if call.case.bias == "bhqk" else total
    sums["d_alibi"] = total * max(x["q"].shape[2], x["k"].shape[2])
    sums["d_relative_bias"] = total
    sums["d_sinks"] = (delta.squeeze(-1)).sum(dim=(0, 2))
    return {name: float(y.max()) if y.numel() else 0.0 for name, y in sums.items()}
