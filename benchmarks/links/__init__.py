"""Parts of the benchmark of links: streams, TLS, and slow, lossy or high-latency networks."""
