"""Commands for the user of a workload: pausing, resuming and ending it by its name; logs, consoles and monitors."""
