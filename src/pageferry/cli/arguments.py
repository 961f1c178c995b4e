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


def fraction(text: str) -> float:
    """A part of 1 from `5%` or `0.05`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no part of a whole: give one like 5% or 0.05") from None
    return value


def seconds(text: str) -> float:
    """Seconds from `200ms`, `0.2s` or `0.2`."""
    factor, digits = (1e-3, text[:-2]) if text.endswith("ms") else (1.0, text.removesuffix("s"))
    try:
        return float(digits) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give one like 200ms or 1.5s") from None
