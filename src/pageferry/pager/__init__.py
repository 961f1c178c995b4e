"""Pagers: processes and threads that load deferred pages of a workload on demand (S8, S10)."""
