"""Parts of `make systems`: each of the ten systems, measured with and without its mechanism."""
