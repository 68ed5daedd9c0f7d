"""tilewise as an executor of Lightning Thunder: what traces hold, what is refused, conditions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tilewise
from tilewise.backends import tiled

# thunder 0.2.6 asks torch in ways that PyTorch 2.13 calls deprecated.
pytestmark = pytest.mark.filterwarnings(r"ignore:torch\.\w*autocast\w*:DeprecationWarning")

NAMED = "align_as, align_to, has_names, refine_names, rename, rename_"


def small(*shapes: tuple[int, ...], grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=grad) for shape in shapes]


def same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def values(fn: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The result of ``fn`` and the gradients of a sum of its sines."""
    out = fn(*tensors)
    leaves = [x for x in tensors if x.requires_grad]
    return (out.detach(), *torch.autograd.grad(out.sin().sum(), leaves))


# What the traces hold.


def test_nothing_as_large_as_the_scores_is_computed_or_saved(lib):
    from thunder.core.vjp_utils import get_saved_for_backward_tensors

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)

    tensors = small(*[(1, 2, 40, 8)] * 3)
    scores = 1 * 2 * 40 * 40
    plain = lib.thunder.jit(attend)
    ours = lib.jit(attend)
    largest = {}
    for jitted in (plain, ours):
        jitted(*tensors)
        saved = get_saved_for_backward_tensors(lib.thunder.last_traces(jitted)[-1])
        largest[jitted] = max(x.numel for x in saved)
    assert largest[plain] == scores and largest[ours] == 1 * 2 * 40 * 8
    assert "softmax" in lib.traces(plain)[0]
    assert not any(
        word in "".join(lib.traces(ours)) for word in ("softmax", "matmul", "[1, 2, 40, 40]")
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_trace_knows_the_shape_and_dtype_of_lse(lib, dtype):
    from thunder.core.vjp_utils import get_saved_for_backward_tensors

    jitted = lib.jit(F.scaled_dot_product_attention)
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    jitted(q, k, v)
    saved = get_saved_for_backward_tensors(lib.thunder.last_traces(jitted)[-1])
    (lse,) = [x for x in saved if x.ndim == 3]
    _, want = tilewise.attention(q, k, v, return_lse=True)
    assert tuple(lse.shape) == want.shape
    assert lib.thunder.core.dtypes.to_torch_dtype(lse.dtype) == want.dtype


def test_the_backward_computes_no_forward(lib, ran):
    def attend(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, m, dropout_p=0.2)

    tensors = small((1, 2, 9, 8), (1, 2, 7, 8), (1, 2, 7, 8), (9, 7))
    out = lib.jit(attend)(*tensors)
    assert ran.take() == (1, 0)
    torch.autograd.grad(out.sum(), tensors)
    assert ran.take() == (0, 1)


def test_without_gradient_there_is_only_the_forward(lib):
    jitted = lib.jit(F.scaled_dot_product_attention)
    q, k, v = small(*[(1, 2, 9, 8)] * 3, grad=False)
    out = jitted(q, k, v)
    assert lib.calls(jitted, "tilewise_forward") == (1, 0)
    assert not lib.traces(jitted)[1]
    assert torch.equal(out, tilewise.attention(q, k, v))


# What is left to other executors.


def refused(lib: Any, *tensors: Tensor, **options: Any) -> str:
    """Why the executor declines, once it is seen that thunder runs the call as if without it."""

    def attend(*tensors):
        return F.scaled_dot_product_attention(*tensors)

    jitted = lib.thunder.jit(attend, executors=[lib.ours.executor], **options)
    got = values(jitted, *tensors)
    assert "tilewise" not in "".join(lib.traces(jitted))
    assert same_bits(got, values(lib.thunder.jit(attend, **options), *tensors))
    return lib.ours.why_not(*tensors) or ""


def test_what_tilewise_cannot_run_goes_on_to_the_next_executor(lib):
    q, k, v, enlarging = small(*[(1, 2, 5, 8)] * 3, (3, 1, 5, 5))
    assert "attn_mask: shape is [3, 1, 5, 5]" in refused(lib, q, k, v, enlarging)
    narrow = torch.randn(5, 5, dtype=torch.bfloat16)
    assert "attn_mask: dtype is torch.bfloat16" in refused(lib, q, k, v, narrow)


@pytest.mark.filterwarnings("ignore:The 'symbolic values' cache option:UserWarning")
def test_symbolic_shapes_go_on_to_the_next_executor(lib):
    refused(lib, *small(*[(1, 2, 5, 8)] * 3), cache="symbolic values")


def test_why_not_judges_looks_alone(lib):
    q, k, v, m = small(*[(1, 2, 5, 8)] * 3, (5, 5))
    why_not = lib.ours.why_not
    assert (
        why_not(q, k, v) is why_not(q, k, v, m, 0.3, scale=2.0) is why_not(q, k, v, None, 1) is None
    )
    assert "together with is_causal" in why_not(q, k, v, m, is_causal=True)
    assert "key: device is meta but query's is cpu" in why_not(q, k.to("meta"), v)
    assert "value: dtype is torch.float64 but query's" in why_not(q, k, v.double())
    assert "key: head_dim is 4 but query's is 8" in why_not(q, k[..., :4], v)
    assert "dropout_p: got 1.5" in why_not(q, k, v, dropout_p=1.5)
    assert "query: dtype is torch.float8_e5m2" in why_not(q.to(torch.float8_e5m2), k, v)


def test_thunder_has_no_enable_gqa(lib):
    """The page tells what to write instead; should thunder learn it, the executor must follow."""
    jitted = lib.jit(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    with pytest.raises(TypeError, match="enable_gqa"):
        jitted(*small((1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)))


# Conditions, names and backends.


def test_a_condition_decides_call_by_call(lib):
    seen = []

    def long(call: Any) -> bool:
        seen.append(call)
        return call.kv_len >= 30

    def attend(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, m, scale=0.5)

    executor = lib.ours.make_executor("tilewise_long", when=long)
    jitted = lib.thunder.jit(attend, executors=[executor])
    short = small(*[(1, 2, 5, 8)] * 3, (5, 5))
    got = values(jitted, *short)
    assert "tilewise" not in "".join(lib.traces(jitted))
    assert same_bits(got, values(lib.thunder.jit(attend), *short))
    values(jitted, *small((1, 2, 5, 8), (1, 2, 30, 8), (1, 2, 30, 8), (5, 30)))
    assert lib.calls(jitted, "tilewise_long_forward") == (1, 0)
    assert lib.calls(jitted, "tilewise_long_backward") == (0, 1)

    shape, device = (1, 2, 5, 8), torch.device("cpu")
    assert seen[0] == lib.ours.Call(
        shape, shape, shape, torch.float32, device, (5, 5), torch.float32, 0.0, False, 0.5
    )
    assert {(call.q_len, call.kv_len, call.head_dim) for call in seen} == {(5, 5, 8), (5, 30, 8)}


def test_executors_with_different_conditions_share_a_trace(lib, monkeypatch):
    ran = []
    originals = {"forward": tiled.forward, "backward": tiled.backward}

    def counted(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if args[0].mask != "band":  # the causal ones run here, too, without the native library
                ran.append(name)
            return originals[name](*args)

        return run

    for name in originals:
        monkeypatch.setattr(tiled, name, counted(name))
    causal = lib.ours.make_executor("causal_ones", when=lambda call: call.is_causal)
    masked = lib.ours.make_executor(
        "masked_ones", when=lambda call: call.mask_dtype == torch.bool, backend="tiled"
    )

    def attend(q, k, v, m):
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        b = F.scaled_dot_product_attention(q, k, v, attn_mask=m)
        return torch.stack([a, b, F.scaled_dot_product_attention(q, k, v)])

    jitted = lib.thunder.jit(attend, executors=[causal, masked])
    q, k, v, m = *small(*[(1, 2, 5, 8)] * 3), torch.rand(5, 5) < 0.5
    got = values(jitted, q, k, v, m)
    assert ran == ["forward", "backward"]
    for name in ("causal_ones", "masked_ones"):
        assert lib.calls(jitted, f"{name}_forward") == (1, 0)
        assert lib.calls(jitted, f"{name}_backward") == (0, 1)
    assert "softmax" in lib.traces(jitted)[0]
    torch.testing.assert_close(got, values(attend, q, k, v, m))


def test_a_backend_asked_for_by_name_runs_or_raises(lib, monkeypatch):
    monkeypatch.setattr(tiled, "unsupported_reasons", lambda problem: ["not today"])
    tilewise.dispatch.choose.cache_clear()
    executor = lib.ours.make_executor("only_tiled", backend="tiled")
    jitted = lib.thunder.jit(F.scaled_dot_product_attention, executors=[executor])
    with pytest.raises(tilewise.UnsupportedError, match="not today"):
        jitted(*small(*[(1, 2, 5, 8)] * 3, grad=False))
    tilewise.dispatch.choose.cache_clear()


def test_a_condition_answers_with_a_bool(lib):
    executor = lib.ours.make_executor("no_answer", when=lambda call: None)
    jitted = lib.thunder.jit(F.scaled_dot_product_attention, executors=[executor])
    with pytest.raises(TypeError, match="when: answered None; it must be True or False"):
        jitted(*small(*[(1, 2, 5, 8)] * 3))


def test_arguments_of_make_executor(lib):
    make = lib.ours.make_executor
    with pytest.raises(TypeError, match="name: expected a string, got int"):
        make(1)
    with pytest.raises(ValueError, match="name: got 'two words'; it must be a Python identifier"):
        make("two words")
    for taken in ("tilewise", "torch", "python", "sdpa"):
        with pytest.raises(ValueError, match=f"name: '{taken}' is an executor already"):
            make(taken)
    with pytest.raises(TypeError, match="when: expected a callable or None, got int"):
        make("conditional", when=3)
    with pytest.raises(ValueError, match="backend"):
        make("elsewhere", backend="nowhere")


def test_the_executor_is_registered_by_name_and_can_be_a_default(lib):
    extend = lib.thunder.extend
    assert extend._executor_map["tilewise"] is lib.ours.executor
    extend.add_default_executor(lib.ours.executor)
    try:
        jitted = lib.thunder.jit(F.scaled_dot_product_attention)
        jitted(*small(*[(1, 2, 5, 8)] * 3))
    finally:
        extend.remove_default_executor(lib.ours.executor)
    assert lib.calls(jitted, "tilewise_forward") == (1, 0)


IMPORTS = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["thunder"] = None
try:
    import tilewise.compat.thunder
except ModuleNotFoundError as error:
    print(error)
del sys.modules["thunder"]
import torch
if not hasattr(torch.Tensor, "align_as"):
    before = dir(torch.Tensor)
    try:
        import tilewise.compat.thunder
    except ImportError as error:
        print(error)
    assert dir(torch.Tensor) == before
else:
    print("this PyTorch has named tensors")
"""


def test_an_import_that_cannot_work_says_what_is_missing(lib):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, env=os.environ, check=True
    )
    absent, *rest = done.stdout.splitlines()
    assert "needs lightning-thunder" in absent
    if hasattr(torch.Tensor, "align_as"):
        return
    assert f"thunder: does not import with PyTorch {torch.__version__}" in rest[0]
    assert f"torch.Tensor lacks {NAMED}" in rest[0]
