"""Duplicate pages inside huge pages (S9): scan, estimate, and share in those large pages where it pays.

::

    estimate = await pageferry.sharing.find(["pid:4711", "pid:4712"])    # nothing is changed
    result = await pageferry.sharing.share(["pid:4711", "pid:4712"])     # large pages are broken where it pays
    await pageferry.sharing.undo(["pid:4711", "pid:4712"])
"""

from typing import TYPE_CHECKING

from pageferry.lazy import lazily

if TYPE_CHECKING:
    from pageferry.sharing.api import find, share, undo
    from pageferry.sharing.events import SharingResult
    from pageferry.sharing.scan import Options

__all__ = ["Options", "SharingResult", "find", "share", "undo"]

# The guard of KSM's switches, a process of its own, does without them.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "Options": "pageferry.sharing.scan",
        "SharingResult": "pageferry.sharing.events",
        "find": "pageferry.sharing.api",
        "share": "pageferry.sharing.api",
        "undo": "pageferry.sharing.api",
    },
)
