"""Parts of the benchmark of huge page sampling."""
