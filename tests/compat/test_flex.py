"""``flex_attention`` on tilewise: masks against PyTorch's own, results against float64."""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask

import tilewise
from tilewise import masks as m
from tilewise.compat import flex
from tilewise.compat.sdpa import as_mask, flex_attention, score_mods
from tilewise.testing import tolerance
from tilewise.testing.cases import Call, Case

LENGTH = 200  # more than one of PyTorch's blocks of 128, and not a multiple
IDS = torch.arange(LENGTH) // 70
ROWS = torch.randn(LENGTH, 3)

MODS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "causal": lambda b, h, q, kv: q >= kv,
    "window": lambda b, h, q, kv: (q - kv).abs() <= 20,
    "documents": lambda b, h, q, kv: (IDS[q] == IDS[kv]) & (q >= kv),
    "by batch": lambda b, h, q, kv: kv < 60 + 100 * b,
    "by head": lambda b, h, q, kv: (q + kv) % (h + 2) != 0,
    "vectors": lambda b, h, q, kv: (ROWS[q] * ROWS[kv]).sum() > 0,
    "constant": lambda b, h, q, kv: torch.tensor(True),
    "nothing": lambda b, h, q, kv: q < 0,
}
"""``vectors`` and ``constant`` mean something only if asked for one entry at a time."""


def dense(mod: Callable[..., Tensor], batch: int, heads: int, length: int) -> Tensor:
    """PyTorch's own evaluation of a ``mask_mod``."""
    return torch_flex.create_mask(mod, batch, heads, length, length, device="cpu")


def case(**fields: Any) -> Call:
    sizes = {"q_heads": 2, "kv_heads": 2, "q_len": LENGTH, "kv_len": LENGTH, "head_dim": 8}
    return Case(**sizes | {"v_dim": 8} | fields).make()


def check(call: Call, **options: Any) -> None:
    """Results and gradients of ``flex_attention``, ``lse`` included, against float64."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **ignored: Any) -> Any:
        return flex_attention(q, k, v, return_lse=True, **options)

    tolerance.check(call, attention, tiles=-(-LENGTH // 16))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", MODS)
def test_masks(name, shared):
    """As a BlockMask and as a bare ``mask_mod``; asked once for all heads or for each."""
    batch, heads = (None, None) if shared else (2, 2)
    if shared and name.startswith("by"):
        pytest.skip("a mask that differs cannot be shared")
    mod = MODS[name]
    block_mask = create_block_mask(mod, batch, heads, LENGTH, LENGTH, device="cpu")
    call = case()
    call = replace(call, options={"mask": m.from_bool(dense(mod, 2, 2, LENGTH))})
    check(call, block_mask=block_mask)
    if not shared:
        check(call, block_mask=mod)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_pytorchs(dtype):
    q, k, v = (torch.randn(2, 4, LENGTH, 8) for _ in range(3))
    block_mask = create_block_mask(MODS["documents"], None, None, LENGTH, LENGTH, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs uncompiled
        want, want_lse = torch_flex.flex_attention(
            q.double(), k[:, :2].double(), v[:, :2].double(), block_mask=block_mask,
            enable_gqa=True, scale=0.5, return_lse=True,
        )  # fmt: skip
    out, lse = flex_attention(q, k[:, :2], v[:, :2], None, block_mask, 0.5, True, return_lse=True)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    assert flex_attention(q.to(dtype), k.to(dtype), v.to(dtype)).dtype == dtype


def test_blocks_count_beside_the_mask_mod():
    """A BlockMask made from blocks alone: what is not listed is not seen, full is full."""
    count = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    full_count = torch.tensor([[[1, 0]]], dtype=torch.int32)
    full_indices = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(
        count, indices, full_count, full_indices, BLOCK_SIZE=(128, 128), mask_mod=MODS["causal"],
        seq_lengths=(LENGTH, LENGTH),
    )  # fmt: skip
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    visible[:128, 128:] = True
    call = case()
    check(replace(call, options={"mask": m.from_bool(visible)}), block_mask=block_mask)


def test_a_mask_of_ours():
    call = case(mask="window")
    check(call, block_mask=call.options["mask"])


def test_a_block_mask_is_lowered_once_and_let_go():
    block_mask = create_block_mask(MODS["causal"], None, None, LENGTH, LENGTH, device="cpu")
    assert as_mask(block_mask) is as_mask(block_mask)
    before = len(flex._made)
    del block_mask
    gc.collect()
    assert len(flex._made) == before - 1


SCORES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], score_mods.ScoreMod]]] = {
    "softcap": ({"softcap": 2.5}, lambda o: score_mods.softcap(2.5)),
    "alibi": ({"alibi": "h"}, lambda o: score_mods.alibi(o["alibi"])),
    "alibi by batch": ({"alibi": "bh"}, lambda o: score_mods.alibi(o["alibi"])),
    "relative_bias": (
        {"relative_bias": True},
        lambda o: score_mods.relative_bias(o["relative_bias"]),
    ),
    "bias": ({"bias": "hqk"}, lambda o: score_mods.bias(o["bias"])),
    "causal": ({"mask": "causal_start"}, lambda o: score_mods.causal()),
    "all": (
        {"softcap": 2.5, "alibi": "h", "bias": "qk", "mask": "causal_start"},
        lambda o: score_mods.combine(
            score_mods.softcap(2.5),
            score_mods.bias(o["bias"]),
            score_mods.causal(),
            score_mods.alibi(o["alibi"]),
        ),
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores(name):
    fields, make = SCORES[name]
    call = case(**fields)

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return flex_attention(q, k, v, make(options), return_lse=True)

    tolerance.check(call, attention, tiles=-(-LENGTH // 16))


def test_a_mask_and_a_score_mod_that_masks():
    call = case(mask="causal_start")
    both = {"mask": call.options["mask"] & m.window(20, 20)}
    check(replace(call, options=both), score_mod=score_mods.causal(), block_mask=MODS["window"])


def test_gqa_and_a_batch_of_one():
    q = torch.randn(2, 4, 9, 8)
    k, v = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    out = flex_attention(q, k, v, block_mask=MODS["causal"], enable_gqa=True)
    wide = [x.expand(2, -1, -1, -1).repeat_interleave(2, 1) for x in (k, v)]
    want = tilewise.standard_attention(*(x.double() for x in (q, *wide)), mask=m.causal())
    # A sum of 9 weighted values after scores of 8 terms, all below 5: 17 roundings of 5 each.
    assert float((out - want).abs().max()) <= 17 * 5 * torch.finfo(torch.float32).eps


def test_compiled_with_a_mask_made_outside():
    torch.compiler.reset()
    block_mask = create_block_mask(MODS["documents"], None, None, LENGTH, LENGTH, device="cpu")
    mask = as_mask(block_mask)
    q, k, v = (torch.randn(2, 2, LENGTH, 8, requires_grad=True) for _ in range(3))

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q * 2, k, v, score_mods.softcap(3.0), mask)

    want = f(q, k, v)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (got, want)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


X = torch.randn(2, 2, LENGTH, 8)


def test_the_signature_is_that_of_pytorch():
    """Names, order, defaults and what is keyword-only, as PyTorch documents them and has them."""
    documented = (
        "query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False, "
        "return_lse=False, kernel_options=None, *, return_aux=None"
    )
    for function in (flex_attention, torch_flex.flex_attention):
        parameters = inspect.signature(function).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert str(inspect.Signature(bare)) == f"({documented})"


def test_lse_as_an_auxiliary_output():
    out, lse = flex_attention(X, X, X, block_mask=MODS["causal"], return_lse=True)
    for asked in (True, False):
        got, aux = flex_attention(
            X, X, X, block_mask=MODS["causal"], return_aux=AuxRequest(lse=asked)
        )
        assert torch.equal(got, out)
        assert aux.max_scores is None
        assert torch.equal(aux.lse, lse) if asked else aux.lse is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs uncompiled
        block_mask = create_block_mask(MODS["causal"], None, None, LENGTH, LENGTH, device="cpu")
        want = torch_flex.flex_attention(
            X, X, X, block_mask=block_mask, return_aux=AuxRequest(lse=True)
        )
    torch.testing.assert_close(lse, want[1].lse)


def test_errors():
    with pytest.raises(tilewise.UnsupportedError, match="score_mod: got squared; tilewise comp"):
        flex_attention(X, X, X, squared)
    with pytest.raises(tilewise.UnsupportedError, match=r"kernel_options: got \['BLOCK_M'\]"):
        flex_attention(X, X, X, kernel_options={"BLOCK_M": 64})
    with pytest.raises(tilewise.UnsupportedError, match="return_aux: got max_scores=True"):
        flex_attention(X, X, X, return_aux=AuxRequest(lse=True, max_scores=True))
    with pytest.raises(ValueError, match="return_aux: given together with return_lse"):
        flex_attention(X, X, X, return_lse=True, return_aux=AuxRequest())
    with pytest.raises(TypeError, match="return_aux: expected an AuxRequest or None, got bool"):
        flex_attention(X, X, X, return_aux=True)
    with pytest.raises(ValueError, match="query: expected 4 dimensions"):
        flex_attention(X[0], X, X)
    with pytest.raises(ValueError, match="key: head_dim is 4"):
        flex_attention(X, X[..., :4], X)
    with pytest.raises(TypeError, match=r"block_mask: expected a BlockMask.*got int"):
        flex_attention(X, X, X, block_mask=3)
    for sizes in ((None, None, 100, LENGTH), (3, None, LENGTH, LENGTH), (None, 3, LENGTH, LENGTH)):
        block_mask = create_block_mask(MODS["causal"], *sizes, device="cpu")
        with pytest.raises(ValueError, match="block_mask: was made for"):
            flex_attention(X, X, X, block_mask=block_mask)
    with pytest.raises(ValueError, match="softcap comes after"):
        score_mods.combine(score_mods.causal(), score_mods.softcap(2.0))
    with pytest.raises(ValueError, match="alibi is given twice"):
        score_mods.combine(*[score_mods.alibi(torch.ones(2))] * 2)
    with pytest.raises(TypeError, match="mods: got a function"):
        score_mods.combine(squared)


def squared(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score * score
