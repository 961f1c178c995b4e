"""Benchmark of fleets."""
