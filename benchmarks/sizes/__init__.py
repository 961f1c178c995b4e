"""Benchmark of the sizes of a checkpoint."""
