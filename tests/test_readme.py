"""The Python examples of the README and of docs/ run, each page in order as one session."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
COMPAT = sorted((DOCS / "compat").glob("*.md"))
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks_of(page: Path) -> list[str]:
    return PYTHON.findall(page.read_text(encoding="utf-8"))


WITH_EXAMPLES = [page for page in sorted(DOCS.rglob("*.md")) if blocks_of(page)]


def test_examples_run():
    blocks = blocks_of(README)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    public = ("attention", "attention_varlen", "decode", "explain", "standard_attention", "masks")
    used = "".join(blocks)
    assert all(f"tilewise.{name}" in used or f"import {name}" in used for name in public)


@pytest.mark.parametrize("page", COMPAT, ids=lambda page: page.stem)
def test_examples_of_the_compat_pages_run(page):
    if page.stem == "flash_attn" and importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("there is a real flash-attn, which the page's install() must not hide")
    if page.stem == "xformers" and importlib.util.find_spec("xformers") is not None:
        pytest.skip("there is a real xFormers, which the page's install() must not hide")
    if page.stem in ("diffusers", "transformers"):
        pytest.importorskip(page.stem, reason="the page's library is not installed")
    if page.stem == "thunder" and importlib.util.find_spec("thunder") is None:
        pytest.skip("the page's library is not installed")
    blocks = blocks_of(page)
    assert blocks
    if page.stem == "thunder":  # it puts methods into torch.Tensor, and thunder's import warns
        code = "\n".join(blocks)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", sorted(set(WITH_EXAMPLES) - set(COMPAT)), ids=lambda p: p.stem)
def test_examples_of_the_other_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a file
    names: dict[str, object] = {}
    for block in blocks_of(page):
        exec(compile(block, str(page), "exec"), names)


def test_pages_with_examples_are_found():
    found = {page.relative_to(DOCS).as_posix() for page in WITH_EXAMPLES}
    assert {"index.md", "start.md", "concepts/tiling.md", "learn/trace.md"} <= found
