"""Placeholders in QEMU command lines, such as `{name}`: one command line serves several guests.

Each guest can thereby have a separate MAC address, host name, socket or log. A word in braces that is not the name of a
placeholder is left unchanged. Objects in JSON are unchanged too: their keys are in quotation marks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

NAME = "name"
"""Placeholder for the name of the guest."""
NUMBER = "n"
"""Placeholder for the number of a clone."""

_PLACEHOLDER = re.compile(r"\{([a-z]+)\}")


def fill(arguments: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Return the arguments in which each placeholder `{key}` is replaced by `values[key]`."""
    return [_PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), word) for word in arguments]
