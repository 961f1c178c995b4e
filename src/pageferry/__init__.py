"""Moves, saves and shapes the memory of running workloads, from outside them."""
