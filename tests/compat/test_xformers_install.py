"""xFormers' names, argument orders and defaults; install(): unmodified code, metadata, refusals."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tilewise.compat import xformers
from tilewise.compat.xformers import ops
from tilewise.compat.xformers.install import MODULES
from tilewise.compat.xformers.ops import fmha
from tilewise.compat.xformers.ops.fmha import attn_bias

no_real_one = pytest.mark.skipif(
    importlib.util.find_spec("xformers") is not None,
    reason="there is a real xFormers, which the stand-in must not hide from the other tests",
)

INPUTS = "query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None"
PADDED = "q_seqlen, kv_padding, kv_seqlen"
GAPPY = "q_seqlen, kv_seqstarts, kv_seqlen"
DEVICE = "*, device=None"
MATERIALIZE = "self, shape, dtype=torch.float32, device='cpu'"

FUNCTIONS = {
    "memory_efficient_attention": f"{INPUTS}, output_dtype=None",
    "memory_efficient_attention_forward": f"{INPUTS}, output_dtype=None",
    "memory_efficient_attention_forward_requires_grad": f"{INPUTS}, output_dtype=None",
    "memory_efficient_attention_backward": f"grad, output, lse, {INPUTS}",
}
PARTS = {
    "memory_efficient_attention_partial": f"{INPUTS}, output_dtype=None",
    "merge_attentions": "attn_split, lse_split, write_lse=True, output_dtype=None",
}
METHODS = {
    "AttentionBias.materialize": MATERIALIZE,
    "LowerTriangularMask.materialize": MATERIALIZE,
    "LowerTriangularMask.add_bias": "self, bias",
    "LowerTriangularMaskWithTensorBias.__init__": "self, bias",
    "LowerTriangularFromBottomRightMask.make_local_attention": "self, window_size",
    "LowerTriangularFromBottomRightLocalAttentionMask.__init__": "self, _window_size",
    "LocalAttentionFromBottomRightMask.__init__": "self, window_left, window_right",
    "BlockDiagonalMask.__init__": "self, q_seqinfo, k_seqinfo, _batch_sizes=None",
    "BlockDiagonalMask.materialize": MATERIALIZE,
    "BlockDiagonalMask.from_seqlens": f"q_seqlen, kv_seqlen=None, {DEVICE}",
    "BlockDiagonalMask.from_tensor_list": "tensors",
    "BlockDiagonalMask.from_tensor_lists_qkv": "tensors_q, tensors_k, tensors_v=None",
    "BlockDiagonalMask.split": "self, tensor",
    "BlockDiagonalMask.split_queries": "self, tensor",
    "BlockDiagonalMask.split_kv": "self, tensor",
    "BlockDiagonalMask.to": "self, device",
    "BlockDiagonalMask.make_causal": "self",
    "BlockDiagonalMask.make_causal_from_bottomright": "self",
    "BlockDiagonalMask.make_local_attention": "self, window_size",
    "BlockDiagonalMask.make_local_attention_from_bottomright": "self, window_size",
    "BlockDiagonalPaddedKeysMask.from_seqlens": f"{PADDED}, causal_diagonal=None, {DEVICE}",
    "BlockDiagonalPaddedKeysMask.make_paged": "self, block_tables, page_size, paged_type",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens": (
        f"{PADDED}, causal_diagonal=None, {DEVICE}"
    ),
    "BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local": (
        f"{PADDED}, window_left, window_right"
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local": f"{PADDED}, window_size",
    "PagedBlockDiagonalPaddedKeysMask.from_seqlens": (
        f"q_seqlen, kv_seqlen, block_tables, page_size, {DEVICE}"
    ),
    "BlockDiagonalGappyKeysMask.from_seqlens": f"{GAPPY}, {DEVICE}",
    "BlockDiagonalGappyKeysMask.make_paged": (
        "self, block_tables, page_size, notional_padding, paged_type"
    ),
    "PagedBlockDiagonalGappyKeysMask.from_seqlens": f"{GAPPY}, block_tables, page_size, {DEVICE}",
}
TABLES = {ops: FUNCTIONS, fmha: FUNCTIONS | PARTS, attn_bias: METHODS}


@pytest.mark.parametrize(
    "module, name",
    [
        pytest.param(module, name, id=f"{module.__name__.rpartition('.')[2]}.{name}")
        for module, table in TABLES.items()
        for name in table
    ],
)
def test_signature(module, name):
    owner, _, attribute = name.rpartition(".")
    holder = getattr(module, owner) if owner else module
    found = inspect.signature(getattr(holder, attribute))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    assert str(inspect.Signature(bare))[1:-1] == TABLES[module][name]
    assert (owner or name) in module.__all__


def test_everything_that_is_named_is_there():
    for module in (xformers, ops, fmha, attn_bias):
        assert all(hasattr(module, name) for name in module.__all__)
    assert xformers.__version__.partition("+")[0].count(".") == 2


MODEL = """
import torch
import xformers.ops as xops
from xformers.ops import LowerTriangularMask, fmha, memory_efficient_attention, unbind
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

x = torch.randn(1, 12, 3, 4, 16, requires_grad=True)
q, k, v = unbind(x, 2)
bias = BlockDiagonalMask.from_seqlens([5, 7]).make_causal()
assert type(bias) is BlockDiagonalCausalMask
out = memory_efficient_attention(q, k, v, attn_bias=bias, op=xops.MemoryEfficientAttentionCutlassOp)
out.sum().backward()
assert x.grad.shape == x.shape
alone = xops.memory_efficient_attention(q[:, :5], k[:, :5], v[:, :5], LowerTriangularMask())
assert torch.allclose(bias.split_queries(out)[0], alone, atol=1e-6)
assert fmha.flash.FwOp in fmha.ALL_FW_OPS
"""


def run(code: str, *, path: Path | None = None) -> str:
    """Run a program of its own; its standard output."""
    environment = dict(os.environ)
    if path is not None:
        places = [str(path), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@no_real_one
def test_an_unmodified_model_runs_and_everything_is_undone(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    run(
        """
        import importlib, importlib.metadata as metadata, importlib.util, sys
        from tilewise.compat import xformers as ours
        from tilewise.compat.xformers.install import MODULES

        finders = list(sys.meta_path)
        assert importlib.util.find_spec("xformers") is None, "importing it installs nothing"
        ours.install()
        ours.install()  # once more changes nothing
        assert len(sys.meta_path) == len(finders) + 1
        assert importlib.util.find_spec("xformers") is not None and "xformers" not in sys.modules
        import model
        assert model.memory_efficient_attention.__module__.startswith("tilewise.")
        for name, source in MODULES.items():
            module, original = importlib.import_module(name), importlib.import_module(source)
            assert module is not original and module.__spec__.name == name
            for public in original.__all__:
                if public not in ("ops", "fmha", "attn_bias"):
                    assert getattr(module, public) is getattr(original, public), public
        import xformers
        assert metadata.version("xformers") == xformers.__version__ == ours.__version__
        assert metadata.packages_distributions()["xformers"] == ["xformers"]
        assert metadata.version("torch")
        assert importlib.util.find_spec("xformers.components") is None

        ours.uninstall()
        ours.uninstall()
        assert sys.meta_path == finders
        assert not any(name.startswith("xformers") for name in sys.modules)
        assert importlib.util.find_spec("xformers") is None
        try:
            metadata.version("xformers")
        except metadata.PackageNotFoundError:
            pass
        else:
            raise AssertionError("the metadata is still there")
        """,
        path=tmp_path,
    )


@no_real_one
def test_a_real_installation_is_hidden_only_by_force(tmp_path):
    package = tmp_path / "xformers"
    package.mkdir()
    (package / "__init__.py").write_text("ops = 'real'\n")
    run(
        """
        import sys
        from tilewise.compat import xformers as ours

        def refused():
            try:
                ours.install()
            except RuntimeError as error:
                assert str(error).startswith("xformers: already installed"), error
                return True

        assert refused() and "xformers" not in sys.modules
        import xformers as real
        assert refused() and real.ops == "real" and sys.modules["xformers"] is real
        ours.install(force=True)
        import xformers.ops
        assert sys.modules["xformers"] is not real and xformers.ops.memory_efficient_attention
        ours.uninstall()
        import xformers as again
        assert again is real
        """,
        path=tmp_path,
    )


def test_every_source_of_a_module_exists():
    for source in MODULES.values():
        __import__(source)
