"""Sampling of large pages: what it costs a workload, and how right it is."""
