"""Image files: pages, metadata and device state of a workload at the snapshot point (S4, S8, S10)."""
