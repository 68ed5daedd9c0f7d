"""FlashAttention for any device, any mask, any derivative: exact attention in O(N) memory."""

from . import masks
from .api import attention, attention_varlen, decode, explain, standard_attention
from .explanation import Explanation
from .problem import UnsupportedError
from .switch import disable, enable

__version__ = "0.1.0"

__all__ = [
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
