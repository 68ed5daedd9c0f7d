"""What people rely on without reading the code: names, options, and who imports whom."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tilewise
from tilewise import masks
from tilewise.dispatch import BACKENDS

SOURCE = Path(tilewise.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

OPTIONS = {
    "mask": None,
    "bias": None,
    "scale": None,
    "softcap": None,
    "alibi": None,
    "relative_bias": None,
    "sinks": None,
    "q_descale": None,
    "k_descale": None,
    "v_descale": None,
    "dropout_p": 0.0,
    "seed": None,
    "return_lse": False,
    "backend": "auto",
}
TENSORS = {
    "attention": ["q", "k", "v"],
    "standard_attention": ["q", "k", "v"],
    "explain": ["q", "k", "v"],
    "attention_varlen": ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"],
    "decode": ["q", "k_cache", "v_cache"],
}


def test_names_of_the_package():
    assert sorted(tilewise.__all__) == [
        "Explanation",
        "UnsupportedError",
        "attention",
        "attention_varlen",
        "decode",
        "disable",
        "enable",
        "explain",
        "masks",
        "standard_attention",
    ]
    assert all(hasattr(tilewise, name) for name in tilewise.__all__)
    assert issubclass(tilewise.UnsupportedError, ValueError)
    assert tilewise.__version__.count(".") == 2
    assert len((SOURCE / "__init__.py").read_text().splitlines()) <= 30


def test_names_of_the_masks():
    assert sorted(masks.__all__) == [
        "Mask",
        "causal",
        "chunks",
        "dilated",
        "documents",
        "from_bool",
        "from_predicate",
        "lengths",
        "prefix",
        "window",
    ]
    assert all(hasattr(masks, name) for name in masks.__all__)


def test_names_of_the_backends():
    assert BACKENDS[-1] == "reference", "the one that runs only when named comes last"
    assert "tiled" in BACKENDS


def parameters(function: str, kind: object) -> dict[str, object]:
    signature = inspect.signature(getattr(tilewise, function))
    return {p.name: p.default for p in signature.parameters.values() if p.kind is kind}


@pytest.mark.parametrize("function", TENSORS)
def test_only_tensors_are_positional(function):
    positional = parameters(function, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert list(positional) == TENSORS[function]
    assert not parameters(function, inspect.Parameter.VAR_KEYWORD)
    assert not parameters(function, inspect.Parameter.VAR_POSITIONAL)
    assert not parameters(function, inspect.Parameter.POSITIONAL_ONLY)


@pytest.mark.parametrize("function", TENSORS)
def test_options_have_one_name_one_default_and_one_order(function):
    expected = dict(OPTIONS)
    if function == "standard_attention":
        del expected["backend"]
    if function == "decode":
        del expected["dropout_p"], expected["seed"]
        expected = {"lengths": inspect.Parameter.empty, "page_table": None, **expected}
    found = parameters(function, inspect.Parameter.KEYWORD_ONLY)
    assert found == expected
    assert list(found) == list(expected)
    assert type(found.get("dropout_p", 0.0)) is float


@pytest.mark.parametrize(
    "function, positional",
    [
        ("causal", {"align": "end"}),
        ("window", {"left": inspect.Parameter.empty, "right": inspect.Parameter.empty,
                    "align": "end"}),
        ("prefix", {"n": inspect.Parameter.empty}),
        ("lengths", {"kv_lengths": inspect.Parameter.empty}),
        ("documents", {"q_ids": inspect.Parameter.empty, "kv_ids": None}),
        ("chunks", {"size": inspect.Parameter.empty}),
        ("dilated", {"step": inspect.Parameter.empty}),
        ("from_bool", {"tensor": inspect.Parameter.empty}),
        ("from_predicate", {"fn": inspect.Parameter.empty}),
    ],
)  # fmt: skip
def test_signatures_of_the_masks(function, positional):
    signature = inspect.signature(getattr(masks, function))
    assert {p.name: p.default for p in signature.parameters.values()} == positional


@pytest.mark.parametrize("function", TENSORS)
def test_every_argument_is_documented(function):
    """Each parameter stands in the docstring, or in that of ``attention`` if it refers there."""
    own = getattr(tilewise, function).__doc__
    referring = function != "attention" and "attention``" in own
    text = own + (tilewise.attention.__doc__ if referring else "")
    for name in inspect.signature(getattr(tilewise, function)).parameters:
        assert re.search(rf"\b{name}:", text), f"{function} does not document {name}"


def test_everything_public_has_a_docstring():
    things = {name: getattr(tilewise, name) for name in tilewise.__all__}
    things |= {f"masks.{name}": getattr(masks, name) for name in masks.__all__}
    things |= {
        f"Mask.{name}": getattr(masks.Mask, name)
        for name in vars(masks.Mask)
        if not name.startswith("_")
    }
    for name, thing in things.items():
        text = thing.__doc__
        assert text, f"{name} has no docstring"
        assert len(text.split()) >= 5, f"the docstring of {name} says too little"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_modules_and_public_functions_have_docstrings(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if tree.body and file.name != "__main__.py":
        assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", ())]
        if "overload" in decorators:  # the implementation speaks for them
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


# Imports.

RECORD = """
import json, sys
import torch, torch.library

class Recorder:
    asked = []
    def find_spec(self, name, path=None, target=None):
        self.asked.append(name)

sys.meta_path.insert(0, Recorder())
before = set(sys.modules)
import tilewise
print(json.dumps([Recorder.asked, sorted(set(sys.modules) - before)]))
"""


@pytest.fixture(scope="module")
def imported() -> tuple[list[str], list[str]]:
    """Modules that ``import tilewise`` looks for, whether installed or not, and those it loads."""
    done = subprocess.run(
        [sys.executable, "-c", RECORD], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    asked, loaded = json.loads(done.stdout)
    assert "tilewise.api" in loaded, "the recorder works"
    return asked, loaded


@pytest.mark.parametrize(
    "name",
    ["triton", "matplotlib", "typer", "rich", "safetensors", "psutil", "transformers"],
)
def test_import_looks_for_no_heavy_package(imported, name):
    for found in imported:
        assert not [n for n in found if n == name or n.startswith(f"{name}.")]


def test_import_loads_no_backend_and_no_outer_room(imported):
    rooms = {name.split(".")[1] for name in imported[1] if name.startswith("tilewise.")}
    assert not rooms & OUTER
    assert not rooms & {"testing", "doctor"}
    backends = [name for name in imported[1] if name.startswith("tilewise.backends")]
    assert backends == []


def targets(file: Path) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports, as paths below it; typing alone does not count.

    ``from .. import masks`` is the module ``masks``; ``from .. import attention``, which is no
    module, is the package itself, ``()``.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = ("tilewise", *file.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            found = [(*base, alias.name) if is_module((*base, alias.name)) else base
                     for alias in node.names]  # fmt: skip
        else:
            continue
        yield from (path[1:] for path in found if path[:1] == ("tilewise",))


def is_module(path: tuple[str, ...]) -> bool:
    if path[:1] != ("tilewise",):
        return False
    place = SOURCE.joinpath(*path[1:])
    return place.is_dir() or place.with_suffix(".py").is_file()


def room(path: tuple[str, ...]) -> str:
    """The file or folder of the package that a module belongs to; "" for the package itself."""
    return path[0].removesuffix(".py").removesuffix("__init__") if path else ""


LAYERS = (
    {"checks", "frame", "philox", "runs", "tensors", "tiles"},
    {"masks", "problem"},
    {"dispatch", "explanation", "lowering", "options", "scores"},
    {"backends"},
    {"ops", "recipes"},
    {"api", "switch"},
    {""},
    {"doctor", "kernels", "nn"},
    {"bench", "compat", "distributed", "testing", "training"},
    {"learn", "reproduce", "tune"},
    {"cli"},
    {"__main__"},
)
"""Each file or folder imports from layers before its own, and within itself."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
OUTER = {"nn", "bench", "compat", "distributed", "learn", "reproduce", "training", "cli"}
"""They rename and arrange, and reach the inner rooms through these doors only."""
DOORS = {"", "api", "masks", "dispatch"}
SIDE_DOORS = {("learn", "philox"), ("learn", "backends")}
"""Rung 6 of the ladder shows how a tile asks the generator for its own entries, rung 9 the kernels
that it leads to."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_imports_point_inwards(file):
    here = room(file.relative_to(SOURCE).parts)
    assert here in RANK, f"{here} is new: give it its place in LAYERS, and in docs/design.md"
    for target in targets(file):
        there = room(target)
        if there == here:
            continue
        name = ".".join(target) or "tilewise"
        assert RANK[there] < RANK[here], f"{here} must not import {name}"
        if here in OUTER and RANK[there] <= RANK[""]:
            open_door = there in DOORS or (here, there) in SIDE_DOORS
            assert open_door, f"{here} must reach {name} through the public functions"


def test_backends_never_import_each_other():
    folder = SOURCE / "backends"
    files = sorted(folder.rglob("*.py"))
    assert len(files) >= 3
    for file in files:
        own = file.relative_to(folder).parts[0].removesuffix(".py")
        for target in targets(file):
            if target[0] == "backends":
                assert target[1:2] == (own,), f"{file.name} imports {'.'.join(target)}"


def test_every_backend_named_has_a_module():
    for name in BACKENDS:
        assert is_module(("tilewise", "backends", name))


def test_the_scan_sees_imports():
    """The scan itself must be able to fail."""
    assert ("backends", "reference") in set(targets(SOURCE / "api.py")), "an import in a function"
    assert ("masks",) in set(targets(SOURCE / "lowering.py")), "from .masks import ..."
    assert ("runs",) in set(targets(SOURCE / "masks.py")), "from . import runs as ..."
    assert ("problem",) not in set(targets(SOURCE / "masks.py")), "only for typing"
    assert ("problem",) in set(targets(SOURCE / "backends" / "tiled.py")), "from ..problem import"
    assert () in set(targets(SOURCE / "doctor.py")), "from . import __version__"
