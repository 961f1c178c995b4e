"""Benchmark of deltas, for pages that a migration sends again."""
