"""Benchmark of saving and loading arrays of Python programs."""
