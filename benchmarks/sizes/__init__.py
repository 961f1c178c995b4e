"""Benchmark of the block sizes of a checkpoint."""
