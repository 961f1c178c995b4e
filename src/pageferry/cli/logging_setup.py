"""Logging of the command line: short lines on stderr."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Container

from pageferry.printable import PrintableFormatter


def with_options(text: str, names: Container[str]) -> str:
    """Replace names of parameters in backticks by options, such as `max_downtime` by --max-downtime. Only the arguments
    of the verb, `names`, are replaced. The library reports errors with names of parameters; users of the command need
    options."""
    return re.sub(r"`([a-z_]+)`", lambda name: _option(name[1]) if name[1] in names else name[0], text)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class _Formatter(PrintableFormatter):
    def __init__(self, names: Container[str]) -> None:
        super().__init__()
        self._names = names

    def format(self, record: logging.LogRecord) -> str:
        message = with_options(super().format(record), self._names)
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


def configure_logging(debug: bool, names: Container[str] = ()) -> None:
    """Log to stderr: messages of pageferry from level INFO, of other libraries from WARNING, and with `debug` of all
    levels. `names` are the arguments of the verb (see `with_options`)."""
    handler = _Handler()
    handler.setFormatter(_Formatter(names))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.getLogger("pageferry").setLevel(logging.DEBUG if debug else logging.INFO)
    # The QMP library logs every error that it also raises. Only the exception is reported.
    logging.getLogger("qemu").setLevel(logging.DEBUG if debug else logging.CRITICAL)
