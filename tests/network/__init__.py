"""Network namespaces as hosts, and the links between them."""
