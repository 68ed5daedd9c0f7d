"""The ladder: one idea a file, in the order of the numbers. Start with ``rung01``."""
