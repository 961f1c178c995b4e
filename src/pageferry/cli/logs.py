"""Logging of the command line: short lines on stderr."""

from __future__ import annotations

import logging
import sys
import time

from pageferry.printable import PrintableFormatter


class _Formatter(PrintableFormatter):
    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.levelno <= logging.DEBUG:
            clock = time.strftime("%H:%M:%S", time.localtime(record.created))
            return f"{clock}.{int(record.msecs):03} {record.name}: {message}"
        if record.levelno >= logging.WARNING:
            return f"{record.levelname.lower()}: {message}"
        return message


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # generic in the typeshed only
    """Handler that writes to the current sys.stderr, which a live progress display replaces while it is active."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        return sys.stderr


def configure_logging(debug: bool) -> None:
    """Log to stderr: pageferry from level INFO, other libraries from WARNING; with `debug`, all levels."""
    handler = _Handler()
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.getLogger("pageferry").setLevel(logging.DEBUG if debug else logging.INFO)
    # The QMP library logs every failure that it also raises; the exception is reported.
    logging.getLogger("qemu").setLevel(logging.DEBUG if debug else logging.CRITICAL)
