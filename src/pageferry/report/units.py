"""Human-readable numbers: sizes in binary units, times in the largest suitable unit."""

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(count: float) -> str:
    """Format a number of bytes: `0 B`, `1.5 KiB`, `203 MiB`."""
    unit = 0
    while abs(count) >= 1024 and unit < len(_BINARY) - 1:
        count /= 1024
        unit += 1
    # Print three significant digits, and whole numbers without a decimal point.
    digits = 0 if unit == 0 or abs(count) >= 99.95 or count == int(count) else 1
    return f"{count:.{digits}f} {_BINARY[unit]}"


def rate(bytes_per_second: float) -> str:
    """Format bytes per second: `850 MiB/s`."""
    return f"{size(bytes_per_second)}/s"


def duration(seconds: float) -> str:
    """Format seconds: `120 us`, `3.4 ms`, `12.0 s`, `2 min 05 s`."""
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02} s"
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def us(microseconds: float) -> str:
    """Format microseconds, in the same form as `duration`."""
    return duration(microseconds / 1e6)


def ms(milliseconds: float) -> str:
    """Format milliseconds, in the same form as `duration`."""
    return duration(milliseconds / 1e3)
