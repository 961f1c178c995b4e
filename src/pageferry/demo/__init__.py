"""The built-in workload, which verifies its memory, and the migration that `pageferry demo` shows."""
