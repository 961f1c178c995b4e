"""Reference to the image whose memory a clone shares, in the details of Hello."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pageferry.errors import ProtocolError
from pageferry.images.metadata import ImageIdentity
from pageferry.workloads.protocols import BASE

_BASE = re.compile(r"([0-9a-f]{32}):([0-9a-f]{16})")


def base_detail(identity: ImageIdentity) -> dict[str, str]:
    """Return the detail that names the image whose memory a workload shares."""
    return {BASE: f"{identity.id}:{identity.digest}"}


def base_of(details: Mapping[str, Any]) -> ImageIdentity | None:
    """Return the identity of the image whose memory the workload shares, from the details in Hello; None if there is
    none. Raises ProtocolError if it is invalid."""
    if BASE not in details:
        return None
    found = _BASE.fullmatch(str(details[BASE]))
    if found is None:
        raise ProtocolError(
            f"invalid detail {BASE} {str(details[BASE])[:80]!r}: expected 32 and 16 hexadecimal digits, joined by a "
            "colon"
        )
    return ImageIdentity(id=found[1], digest=found[2])
