"""Arenas: memory of Python programs, as workloads."""
