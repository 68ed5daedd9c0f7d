"""Fail if a source file has 500 lines or more, or a Python function 100 or more.

Usage: ``python tools/check_sizes.py [FILE ...]``. Without arguments every Python and C++ file of
the project is checked. Function lengths are measured in Python only.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 500
FUNCTION_LINES = 100
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "csrc", "tests", "tools", "benchmarks", "examples")
SUFFIXES = {".py", ".c", ".cpp", ".h", ".hpp", ".inl"}


def source_files() -> Iterator[Path]:
    """Every file the rules apply to."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in SUFFIXES and file.is_file():
                yield file


def complaints(file: Path) -> Iterator[str]:
    """One line for each rule that ``file`` breaks."""
    text = file.read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines >= FILE_LINES:
        yield f"{file}: {lines} lines, must stay under {FILE_LINES}"
    if file.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text, filename=str(file))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length >= FUNCTION_LINES:
                where = f"{file}:{node.lineno}: {node.name}()"
                yield f"{where} has {length} lines, must stay under {FUNCTION_LINES}"


def main(arguments: list[str]) -> int:
    """Print every complaint about the named files, or all; 1 if there was one."""
    files = [Path(a) for a in arguments] or list(source_files())
    found = [line for file in files for line in complaints(file)]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
