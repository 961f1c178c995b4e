"""Benchmark of page sharing (S9)."""
