"""Parts of `make systems`: each of the ten systems with and without its mechanism, a few seconds each."""
