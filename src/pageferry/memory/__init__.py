"""Memory of workloads: regions, their mappings in processes, and their view in this process."""
