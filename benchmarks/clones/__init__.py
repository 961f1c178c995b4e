"""Parts of the clone benchmark, one module per measurement."""
