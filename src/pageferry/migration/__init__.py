"""Live migration: a running workload moves to another process or host without losing a write (S1, S2, S5, S6, S7)."""
