"""Benchmark of deltas: programs whose pages are sent again."""
