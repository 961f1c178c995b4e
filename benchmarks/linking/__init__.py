"""The parts of the benchmark of links: streams, TLS, and networks that are long, slow or lossy."""
