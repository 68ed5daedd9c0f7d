"""``tilewise.enable`` and ``tilewise.disable``; what they do is loaded when they are called."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compat.sdpa_routing import Enabled


def enable() -> Enabled:
    """Route ``torch.nn.functional.scaled_dot_product_attention`` on CPU tensors to tilewise.

    Takes effect at once, forward and backward, in every thread of the process and however a model
    imported the function; lasts until ``disable()``. As a context manager, ``with
    tilewise.enable():``, it lasts until the block ends; blocks nest, and may overlap in several
    threads. Calls that tilewise cannot honour exactly run PyTorch's own code as before;
    ``tilewise.compat.sdpa.why_not`` names the reason.

    Turning it on or off makes compiled functions compile again (``torch.compiler.reset``), and must
    not happen while another thread is inside an attention call.

    Raises:
        RuntimeError: called while ``torch.compile`` traces.
    """
    return _routing().enable()


def disable() -> None:
    """Undo every ``enable`` so far: PyTorch's dispatcher is as it was before the first.

    Raises:
        RuntimeError: called while ``torch.compile`` traces.
    """
    _routing().disable()


def _routing() -> Any:
    return importlib.import_module("tilewise.compat.sdpa_routing")
