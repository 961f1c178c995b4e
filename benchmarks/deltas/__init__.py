"""Programs whose pages are sent again."""
