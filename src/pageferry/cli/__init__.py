"""The command `pageferry`: one module per verb, imported when it is asked for."""
