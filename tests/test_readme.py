"""The Python examples of the README and of docs/compat run, each page in order as one session."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
COMPAT = sorted((ROOT / "docs" / "compat").glob("*.md"))


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
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
    if page.stem == "transformers":
        pytest.importorskip("transformers", reason="the page's library is not installed")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
