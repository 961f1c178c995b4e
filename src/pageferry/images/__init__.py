"""Image files: pages, metadata and device state of a workload at one moment (S4, S8, S10)."""
