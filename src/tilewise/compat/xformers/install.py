"""Stand in for ``xformers``: imports of that name find this package, metadata included."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

from ... import __version__ as tilewise_version

VERSION = f"0.0.32+tilewise.{tilewise_version}"
"""The xFormers release whose interface this is; version checks read it."""

HERE = __name__.rpartition(".")[0]
MODULES = {
    "xformers": HERE,
    "xformers.ops": f"{HERE}.ops",
    "xformers.ops.fmha": f"{HERE}.ops.fmha",
    "xformers.ops.fmha.attn_bias": f"{HERE}.ops.fmha.attn_bias",
}
"""Each name that can be imported, and the module that has its contents."""

PACKAGES = {"xformers", "xformers.ops", "xformers.ops.fmha"}


def install(*, force: bool = False) -> None:
    """Make ``import xformers`` find this package; call it before anything imports that.

    ``importlib.metadata.version("xformers")`` answers as well. A second call does nothing.

    Raises:
        RuntimeError: there is a real xFormers, or another stand-in, and ``force`` is not given.
            With ``force`` it is hidden until ``uninstall``; references to its functions that code
            already holds stay as they are.
    """
    if _installed():
        return
    if not force and ("xformers" in sys.modules or importlib.util.find_spec("xformers")):
        raise RuntimeError(
            "xformers: already installed or imported; it is not replaced unless force=True"
        )
    sys.meta_path.insert(0, _Finder(_take_out_modules()))


def uninstall() -> None:
    """Undo ``install``: forget the stand-in's modules and bring back those that it hid."""
    for finder in _installed():
        _take_out_modules()
        sys.modules.update(finder.hidden)
        sys.meta_path.remove(finder)


def _installed() -> list[_Finder]:
    return [finder for finder in sys.meta_path if isinstance(finder, _Finder)]


def _take_out_modules() -> dict[str, ModuleType]:
    """Remove from ``sys.modules``, and return, all that stand under the name taken here."""
    names = [name for name in sys.modules if name.partition(".")[0] == "xformers"]
    return {name: sys.modules.pop(name) for name in names}


class _Finder(DistributionFinder):
    """Finds the modules of ``MODULES`` and the metadata of the distribution."""

    def __init__(self, hidden: dict[str, ModuleType]) -> None:
        self.hidden = hidden

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the names in ``MODULES``; None, that is "ask others", for the rest."""
        source = MODULES.get(fullname)
        if source is None:
            return None
        found = importlib.util.find_spec(source)
        origin = None if found is None else found.origin
        return ModuleSpec(fullname, _Copy(source), origin=origin, is_package=fullname in PACKAGES)

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        """The one distribution, for searches by its name and for listings."""
        name = None if context is None else context.name
        if name is None or name.lower() == "xformers":
            yield _XFormers()


class _Copy(Loader):
    """Fills a new module with the public names of ``source``, which keeps its own identity."""

    def __init__(self, source: str) -> None:
        self.source = source

    def exec_module(self, module: ModuleType) -> None:
        source = importlib.import_module(self.source)
        module.__doc__, module.__file__ = source.__doc__, source.__file__
        for name in source.__all__:
            setattr(module, name, getattr(source, name))


class _XFormers(Distribution):
    """Metadata of an xFormers that no installer knows about."""

    def read_text(self, filename: str) -> str | None:
        """The two files that tools read."""
        texts = {
            "METADATA": (
                f"Metadata-Version: 2.1\nName: xformers\nVersion: {VERSION}\n"
                f"Summary: xFormers' attention interface, computed by tilewise\n"
            ),
            "top_level.txt": "xformers\n",
        }
        return texts.get(filename)

    def locate_file(self, path: object) -> Path:
        """Where a file of this package is."""
        return Path(__file__).parent / str(path)
