"""The parts of the benchmark of moves in which the workload runs before its pages are there."""
