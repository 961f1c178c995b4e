"""Parts of the benchmark of links: streams, TLS, and long, slow or lossy networks."""
