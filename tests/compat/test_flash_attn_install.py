"""install(): unmodified code that imports flash_attn, its metadata, refusals, and uninstall()."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tilewise.compat import flash_attn as fa
from tilewise.compat.flash_attn.install import MODULES

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface")),
    reason="there is a real flash-attn, which the stand-in must not hide from the other tests",
)

MODEL = """
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.modules.mha import MHA, FlashCrossAttention, FlashSelfAttention

import torch

q = torch.randn(2, 9, 4, 16, requires_grad=True)
k = v = torch.randn(2, 9, 2, 16)
out = flash_attn_func(q, k, v, causal=True)
out.sum().backward()
assert q.grad.shape == q.shape

mask = torch.arange(9) < torch.tensor([[9], [4]])
packed, indices, cu_seqlens, longest, _ = unpad_input(torch.stack((k, v), 2), mask)
q_packed = index_first_axis(q.detach().flatten(0, 1), indices)
ragged = flash_attn_varlen_func(
    q_packed, packed[:, 0], packed[:, 1], cu_seqlens, cu_seqlens, longest, longest, causal=True
)
back = pad_input(ragged, indices, 2, 9)
assert torch.allclose(back[mask], out[mask], atol=1e-5) and (back[~mask] == 0).all()

cache = torch.zeros(2, 16, 2, 16), torch.zeros(2, 16, 2, 16)
with torch.no_grad():
    for n in range(9):
        row = slice(n, n + 1)
        step = flash_attn_with_kvcache(
            q[:, row], *cache, k[:, row], v[:, row], cache_seqlens=n, causal=True
        )
        assert torch.allclose(step, out[:, row], atol=1e-5)
y = MHA(32, 4, rotary_emb_dim=8, use_flash_attn=True)(torch.randn(1, 5, 32))
assert y.shape == (1, 5, 32)
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


def test_an_unmodified_model_runs(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    out = run(
        """
        import tilewise.compat.flash_attn
        tilewise.compat.flash_attn.install()
        import model
        print(model.flash_attn_func.__module__)
        """,
        path=tmp_path,
    )
    assert out == "tilewise.compat.flash_attn.dense\n"


def test_modules_metadata_and_uninstall():
    out = run(
        """
        import importlib, importlib.metadata as metadata, importlib.util, pickle, sys
        from tilewise.compat import flash_attn as ours
        from tilewise.compat.flash_attn.install import MODULES

        finders = list(sys.meta_path)
        assert importlib.util.find_spec("flash_attn") is None, "importing it installs nothing"
        ours.install()
        ours.install()  # once more changes nothing
        assert len(sys.meta_path) == len(finders) + 1
        assert importlib.util.find_spec("flash_attn") is not None
        assert "flash_attn" not in sys.modules, "found without being imported"
        for name, source in MODULES.items():
            module = importlib.import_module(name)
            original = importlib.import_module(source)
            assert module is not original and module.__name__ == name == module.__spec__.name
            assert module.__file__ == original.__file__
            for public in getattr(original, "__all__", ()):
                assert getattr(module, public) is getattr(original, public), public
            assert original.__name__ == source == original.__spec__.name
        import flash_attn, flash_attn_interface
        from flash_attn import cute, layers
        assert flash_attn_interface.flash_attn_combine and cute.flash_attn_varlen_func
        assert flash_attn.layers.rotary is layers.rotary
        assert pickle.loads(pickle.dumps(flash_attn.flash_attn_func)) is ours.flash_attn_func

        for name in ("flash_attn", "flash-attn", "Flash_Attn"):
            assert metadata.version(name) == flash_attn.__version__ == ours.__version__
        assert metadata.packages_distributions()["flash_attn"] == ["flash_attn"]
        assert metadata.metadata("flash-attn")["Name"] == "flash_attn"
        assert metadata.version("torch")
        for missing in ("flash_attn.ops", "flash_attn.layers.patch_embed"):
            assert importlib.util.find_spec(missing) is None
        try:
            import flash_attn.losses
        except ModuleNotFoundError as error:
            assert error.name == "flash_attn.losses"
        else:
            raise AssertionError("flash_attn.losses was found")

        ours.uninstall()
        ours.uninstall()
        assert sys.meta_path == finders
        assert not any(name.startswith("flash_attn") for name in sys.modules)
        assert importlib.util.find_spec("flash_attn") is None
        try:
            metadata.version("flash_attn")
        except metadata.PackageNotFoundError:
            pass
        else:
            raise AssertionError("the metadata is still there")
        print(ours.__version__)
        """
    )
    assert out.strip() == fa.__version__


def test_version_passes_the_usual_comparisons():
    version, _, local = fa.__version__.partition("+")
    assert tuple(map(int, version.split("."))) >= (2, 7, 0)
    assert local.startswith("tilewise.")


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_a_real_installation_is_hidden_only_by_force(tmp_path, name):
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("flash_attn_func = 'real'\n")
    metadata = tmp_path / "flash_attn-2.5.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.5.0\n")
    run(
        f"""
        import sys, types
        from importlib.metadata import version
        from tilewise.compat import flash_attn as ours

        def refused():
            try:
                ours.install()
            except RuntimeError as error:
                assert str(error).startswith("{name}: already installed"), error
                assert "force=True" in str(error)
                return True

        assert refused() and "{name}" not in sys.modules
        import {name} as real
        assert refused() and real.flash_attn_func == "real"
        assert sys.modules["{name}"] is real and version("flash_attn") == "2.5.0"

        ours.install(force=True)
        import {name} as stand_in
        assert stand_in is not real and callable(stand_in.flash_attn_func)
        assert version("flash_attn") == ours.__version__
        ours.uninstall()
        import {name} as again
        assert again is real and version("flash_attn") == "2.5.0"

        # Another stand-in, which has no spec, is not replaced either.
        sys.modules["{name}"] = stub = types.ModuleType("{name}")
        assert refused() and sys.modules["{name}"] is stub
        """,
        path=tmp_path,
    )


def test_every_source_of_a_module_exists():
    for source in MODULES.values():
        __import__(source)


@pytest.mark.slow
def test_the_example_learns_and_generates():
    example = Path(__file__).parents[2] / "examples" / "flash_attn_on_cpu.py"
    out = run(f"import runpy; runpy.run_path({str(example)!r}, run_name='__main__')")
    assert out.splitlines()[-1] == "100% of the steps are steps of 3"
