"""Shared parts of the benchmarks: allocated memory, process accounting, serial lines, tables."""
