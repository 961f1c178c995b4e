"""The command `pageferry`: one module per verb, imported on first use."""
