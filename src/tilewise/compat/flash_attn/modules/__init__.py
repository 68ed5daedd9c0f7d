"""``flash_attn.modules``: multi-head attention."""
