"""The parts of the migration benchmark, one module per question."""
