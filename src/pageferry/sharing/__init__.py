"""Page sharing found inside large pages (S9): scan, estimate, and share in those large pages where it pays.

::

    estimate = await pageferry.sharing.find(["pid:4711", "pid:4712"])    # nothing is changed
    result = await pageferry.sharing.share(["pid:4711", "pid:4712"])     # large pages are broken where it pays
    await pageferry.sharing.undo(["pid:4711", "pid:4712"])
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pageferry.sharing.api import find, share, undo

__all__ = ["find", "share", "undo"]


def __getattr__(name: str) -> object:
    # Imported when first asked for: the guard of KSM's switches, a process of its own, does without.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.api"), name)
    globals()[name] = value
    return value
