"""Benchmark of page fault handlers for microVMs."""
