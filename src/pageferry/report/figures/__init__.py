"""Facts and figures of reports: one module per kind of run, which derives both from an event log."""
