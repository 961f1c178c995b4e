"""Benchmark of guests with disks: pauses of checkpoints, and migrations that copy disks."""
