"""Types of arguments that several verbs take."""

from __future__ import annotations

import argparse
import re

_SUFFIXES = {suffix: 1 << 10 * power for power, suffix in enumerate("BKMGT")}


def size(text: str) -> int:
    """Bytes from `512`, `64K`, `1.5G` or `2MiB`: binary units, as QEMU takes them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([BKMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give a number with K, M, G or T, like 512M or 1.5G")
    return round(float(match[1]) * _SUFFIXES[match[2].upper() or "B"])


def milliseconds(text: str) -> float:
    """Seconds from a number of milliseconds."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of milliseconds") from None
    return value / 1e3
