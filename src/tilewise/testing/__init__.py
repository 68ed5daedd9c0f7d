"""What tests and benchmarks share: one case generator, a float64 oracle, derived tolerances."""
