"""To understand FlashAttention: a ladder whose rungs run, a model of what it moves, and pictures.

``tilewise learn`` climbs the ladder; ``docs/learn/index.md`` is the text to read beside it.
"""
