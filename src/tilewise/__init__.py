"""FlashAttention for any device, any mask, any derivative: exact softmax attention in O(N) memory."""

from . import masks
from .api import (
    Explanation,
    attention,
    attention_varlen,
    decode,
    explain,
    standard_attention,
)
from .problem import UnsupportedError

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "decode",
    "explain",
    "masks",
    "standard_attention",
]
