"""Checkpoints: memory saved while the workload runs, and read back while it runs (S4, S8, S10)."""
