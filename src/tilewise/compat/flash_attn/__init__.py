"""flash-attn's interface on any device: the same names in the same places.

Import from here instead of from ``flash_attn``, or call ``install()`` once, before anything imports
``flash_attn``, and unmodified code finds this package under that name. Modules keep their paths:
``bert_padding``, ``flash_attn_interface``, ``layers.rotary``, ``modules.mha``, ``cute``
(FlashAttention-4); ``fa3`` is what FlashAttention-3 calls ``flash_attn_interface``.
"""

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .install import VERSION as __version__
from .install import install, uninstall

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
