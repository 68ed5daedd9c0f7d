"""Which backend runs a problem: the first that has no reason not to.

A backend is a module with ``unsupported_reasons(problem)``, ``plan(problem)``, ``forward`` and
``backward``. It is imported when it is first asked, never by ``import tilewise``.
"""

from __future__ import annotations

import importlib
from functools import cache, lru_cache
from typing import Protocol, cast

from torch import Tensor

from .problem import Inputs, Plan, Problem, UnsupportedError

AUTO = ("native", "triton", "tiled")
"""The order in which ``backend="auto"`` asks."""

BACKENDS = (*AUTO, "reference")
"""All names. ``reference`` materialises the score matrix, so it runs only when named."""


class Backend(Protocol):
    """What a backend module offers."""

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Why it cannot run ``problem``; empty if it can."""

    def plan(self, problem: Problem) -> Plan:
        """How it would run ``problem``."""

    def forward(self, problem: Problem, inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
        """``out`` in q's dtype and layout, and ``lse``."""

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        plan: Plan,
        out: Tensor,
        lse: Tensor,
        d_out: Tensor,
        d_lse: Tensor | None,
        needs: dict[str, bool],
    ) -> dict[str, Tensor]:
        """The gradients asked for by ``needs``, each in its input's dtype and shape.

        ``d_lse`` is None where nothing was made of ``lse``.
        """


@cache
def backend_module(name: str) -> Backend:
    """Import the backend ``name``."""
    return cast(Backend, importlib.import_module(f"tilewise.backends.{name}"))


def check_name(backend: object) -> None:
    """Raise ValueError unless ``backend`` is ``"auto"`` or a known name."""
    if backend != "auto" and backend not in BACKENDS:
        known = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend: got {backend!r}; it must be one of {known}")


@lru_cache(maxsize=4096)
def choose(problem: Problem, backend: str) -> Plan:
    """The plan of the backend that runs ``problem``.

    Raises UnsupportedError with every reason if the named backend, or none of them, can.
    """
    asked = AUTO if backend == "auto" else (backend,)
    found: list[str] = []
    for name in asked:
        module = backend_module(name)
        reasons = module.unsupported_reasons(problem)
        if not reasons:
            return module.plan(problem)
        found += [f"{name}: {reason}" for reason in reasons]
    raise UnsupportedError("backend: no backend asked for can run this call: " + "; ".join(found))


def reasons_against(problem: Problem) -> dict[str, list[str]]:
    """For each backend, why it cannot run ``problem``."""
    return {name: backend_module(name).unsupported_reasons(problem) for name in BACKENDS}
