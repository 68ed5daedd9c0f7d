"""thunder and tilewise's module for it, imported where thunder's import needs help."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

NAMED = ("align_as", "align_to", "has_names", "refine_names", "rename", "rename_")


def stand_in(name: str) -> Callable[..., Any]:
    def missing(*args: object, **options: object) -> None:
        raise NotImplementedError(f"torch.Tensor.{name} is gone")

    missing.__name__ = name
    return missing


class Libraries:
    """``thunder``, ``tilewise.compat.thunder`` as ``ours``, and what traces hold."""

    def __init__(self, thunder: Any, ours: Any) -> None:
        self.thunder, self.ours = thunder, ours

    def jit(self, fn: Any) -> Any:
        """Compiled with our executor, and thunder's own behind it."""
        return self.thunder.jit(fn, executors=[self.ours.executor])

    def traces(self, jitted: Any) -> tuple[str, str]:
        """The last forward and backward trace as text; "" where there is no backward."""
        backward = self.thunder.last_backward_traces(jitted)
        return str(self.thunder.last_traces(jitted)[-1]), str(backward[-1]) if backward else ""

    def calls(self, jitted: Any, name: str) -> tuple[int, int]:
        """How often the operator ``name`` is called in the forward and in the backward."""
        forward, backward = (len(re.findall(rf"= {name}\(", t)) for t in self.traces(jitted))
        return forward, backward


@pytest.fixture(scope="session")
def lib() -> Libraries:
    """thunder 0.2.6 lists the methods of named tensors, which PyTorch 2.13 no longer has, so it
    gets stand-ins while it is imported; nothing here calls them."""
    if importlib.util.find_spec("thunder") is None:
        pytest.skip("lightning-thunder is not installed")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in NAMED:
            if not hasattr(torch.Tensor, name):
                patch.setattr(torch.Tensor, name, stand_in(name), raising=False)
        import thunder

        from tilewise.compat import thunder as ours
    return Libraries(thunder, ours)
