"""What benchmarks share: warm memory, process accounting, the guest's own voice."""
