"""What reports draw: one module for each kind of run, each making facts and figures of an event log."""
