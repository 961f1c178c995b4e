"""Memory of workloads: regions, their mappings in processes, and our own view of them."""
