"""Filter for output: a terminal must not interpret text of peers, guests and images.

Control characters (ESC and CSI start terminal commands), invisible characters and those that change the direction of
text are replaced by escapes such as `\\x1b`. Line feeds and tabs remain. In a message, all lines but the first are
indented, so that no part of it looks like a message of pageferry. In JSON, the same characters are written as
`\\u009b`, which does not change the value.
"""

from __future__ import annotations

import logging
import re

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, DEL, C1
    "\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # invisible, or direction marks
    "\ud800-\udfff"  # bytes of a file name that are not UTF-8
    "\U000e0000-\U000e007f]"  # tags
)


def printable(text: str) -> str:
    """Return the text with escapes for all characters that a terminal could interpret or hide."""
    return _UNSAFE.sub(_escape, text)


def message(text: str) -> str:
    """Return `printable` text of one message, with the lines after the first indented by two spaces."""
    return printable(text).replace("\n", "\n  ")


def printable_json(line: bytes) -> bytes:
    """Return a JSON document with escapes for the characters that `printable` escapes. The values in it do not
    change."""
    if line.isascii() and b"\x7f" not in line:  # the encoder has escaped C0 already
        return line
    return _UNSAFE.sub(_escape_json, line.decode()).encode()


class PrintableFormatter(logging.Formatter):
    """Formatter of log records that escapes unsafe characters in the messages of all libraries."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted message, with unsafe characters escaped."""
        return message(super().format(record))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _escape_json(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))
