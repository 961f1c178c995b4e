"""Facts and figures of reports. There is one module per kind of run; it derives both from an event log."""
