"""Commands for the operator of a workload: pausing, resuming, shutting down and stopping it by its name."""
