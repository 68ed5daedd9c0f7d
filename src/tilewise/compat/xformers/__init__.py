"""xFormers' memory-efficient attention on any device: the same names in the same places.

Import ``tilewise.compat.xformers.ops`` instead of ``xformers.ops``, or call ``install()`` once,
before anything imports ``xformers``, and unmodified code finds this package under that name.
"""

from . import ops
from .install import VERSION as __version__
from .install import install, uninstall

__all__ = ["__version__", "install", "ops", "uninstall"]
