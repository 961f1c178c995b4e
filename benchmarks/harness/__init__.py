"""Shared parts of benchmarks: backed memory, process accounting, serial lines, tables."""
