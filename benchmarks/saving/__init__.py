"""The parts of the checkpoint benchmark, one module per question."""
