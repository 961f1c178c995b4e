"""Parts of the migration benchmark, one module per measurement."""
