"""The parts of the restore benchmark, one module per question."""
