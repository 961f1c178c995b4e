"""Duplicate pages inside huge pages (S9): scan, estimate, and share in those huge pages where it pays.

::

    estimate = await pageferry.sharing.find(["pid:4711", "pid:4712"])    # changes nothing
    result = await pageferry.sharing.share(["pid:4711", "pid:4712"])     # splits huge pages where it pays
    await pageferry.sharing.undo(["pid:4711", "pid:4712"])
"""

from typing import TYPE_CHECKING

from pageferry.lazy import lazily

if TYPE_CHECKING:
    from pageferry.sharing.api import find, share, undo
    from pageferry.sharing.events import SharingResult
    from pageferry.sharing.scan import Options

__all__ = ["Options", "SharingResult", "find", "share", "undo"]

# Loaded on demand: the guardian of KSM's settings, a separate process, does not need them.
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
