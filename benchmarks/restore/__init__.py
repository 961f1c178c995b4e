"""Parts of the restore benchmark, one module per measurement."""
