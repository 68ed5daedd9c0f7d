"""The README's Python examples run, in order, as one session."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    public = ("attention", "attention_varlen", "decode", "explain", "standard_attention", "masks")
    used = "".join(blocks)
    assert all(f"tilewise.{name}" in used or f"import {name}" in used for name in public)
