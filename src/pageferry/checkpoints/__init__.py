"""Checkpoints: memory is saved while the workload runs, and loaded while the restored workload runs (S4, S8, S10)."""
