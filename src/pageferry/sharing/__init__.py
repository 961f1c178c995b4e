"""Duplicate pages inside huge pages (S9): find them, estimate the gain, and share them where splitting pays off.

::

    estimate = pageferry.sharing.find(["pid:4711", "pid:4712"])    # changes nothing
    result = pageferry.sharing.share(["pid:4711", "pid:4712"])     # splits huge pages where it pays off
    pageferry.sharing.undo(["pid:4711", "pid:4712"])
"""

from typing import TYPE_CHECKING

from pageferry.lazy import lazily

if TYPE_CHECKING:
    from pageferry.sharing.api import find, find_async, share, share_async, undo, undo_async
    from pageferry.sharing.events import SharingResult
    from pageferry.sharing.options import Options

__all__ = ["Options", "SharingResult", "find", "find_async", "share", "share_async", "undo", "undo_async"]

# These names are imported on first use, like those of the package `pageferry`.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "Options": "pageferry.sharing.options",
        "SharingResult": "pageferry.sharing.events",
        "find": "pageferry.sharing.api",
        "find_async": "pageferry.sharing.api",
        "share": "pageferry.sharing.api",
        "share_async": "pageferry.sharing.api",
        "undo": "pageferry.sharing.api",
        "undo_async": "pageferry.sharing.api",
    },
)
