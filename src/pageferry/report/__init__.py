"""Output of commands: results on stdout and progress on stderr, human-readable or as JSON."""
