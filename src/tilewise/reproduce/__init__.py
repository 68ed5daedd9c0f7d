"""The tables and figures of the FlashAttention papers, run again on the machine at hand.

``published`` holds what the papers say, ``tables`` runs each table, ``page`` and ``plots`` show
both side by side.
"""
