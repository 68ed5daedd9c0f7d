"""Layers and a small GPT built on :func:`tilewise.attention` and :func:`tilewise.decode`."""

from .attention import FlashMultiHeadAttention, ScoreOptions
from .blocks import TransformerDecoderBlock, TransformerEncoderBlock
from .cache import KVCache
from .gpt import GPT, GPTConfig
from .rotary import RotaryConfig, apply_rotary

__all__ = [
    "GPT",
    "FlashMultiHeadAttention",
    "GPTConfig",
    "KVCache",
    "RotaryConfig",
    "ScoreOptions",
    "TransformerDecoderBlock",
    "TransformerEncoderBlock",
    "apply_rotary",
]
