"""What commands tell: events on the way, and a result at the end, as records with a name.

Every package has its own, in a module `events`; docs/events.md lists them all. A field may be added at any time; when
one is renamed, removed or takes another meaning, `SCHEMA` grows, so that what was written before is not misread.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

SCHEMA = 1
"""Version of all events together, as the first line of an event log names it."""


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", tag_field="type"):
    """Base of events and results; `type` tells them apart."""


Listener = Callable[[Event], object]
"""Is called with each event, where the work is done (the event loop, mostly); must not block."""


def ignore(_: Event) -> None:
    """A listener for those who do not want to know."""
