"""Parts of the checkpoint benchmark, one module per measurement."""
