"""Benchmark of sharing (S9)."""
