"""The parts of `make systems`: each of the ten systems, with its mechanism and without, a few seconds each."""
