"""Makes griffe, which reads the docstrings for the site, understand those of this project."""

from __future__ import annotations

import re
from typing import Any

import griffe

# "Args:" may list several names before one text, and such a list may need two lines.
_LIST = re.compile(r"^([ ]*\w+(?:, \w+)*,)\n[ ]+(?=(?:\w+, )*\w+(?:: |,\n))", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|mod):`~?([^`]+)`")


def plain(docstring: str) -> str:
    """The docstring with each list of names on one line, and with references as code."""
    while _LIST.search(docstring):
        docstring = _LIST.sub(r"\1 ", docstring)
    return _ROLE.sub(r"`\1`", docstring)


class Docstrings(griffe.Extension):  # type: ignore[misc]
    """Passes every docstring through ``plain``."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Called by griffe for each object once its docstring is known."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
