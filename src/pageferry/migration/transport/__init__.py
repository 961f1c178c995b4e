"""Transport of a migration: addresses, sockets, TLS, the control connection and its messages."""
