"""Options of `pageferry serve`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pageferry.errors import UsageError
from pageferry.options import Count
from pageferry.stores.options import OpenArguments, OpenOptions

OnFailure = Literal["kill", "freeze"]
MAX_MICROVMS = 4096


class ServeArguments(OpenArguments, total=False):
    """Keyword arguments of `serve` for the fields of `ServeOptions`."""

    eager: bool
    prefetch: bool
    on_failure: OnFailure
    microvms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(OpenOptions):
    """Options of `serve`. Raises UsageError."""

    eager: bool = False
    """Load in the background at full speed, without yielding to page faults."""
    prefetch: bool = True
    """Load pages in the background; otherwise only accessed pages are loaded."""
    on_failure: OnFailure = "kill"
    """Kill Firecracker (`kill`) or stop it (`freeze`, by SIGSTOP) if the memory of its microVM cannot be loaded."""
    microvms: Annotated[int, Count(0, MAX_MICROVMS)] = 1
    """Number of microVMs to serve; 0 for any number, until the pager is stopped."""

    def __post_init__(self) -> None:
        OpenOptions.__post_init__(self)
        if self.eager and not self.prefetch:
            raise UsageError(
                "`eager` requires background loading, which --no-prefetch (in Python prefetch=False) disables; remove "
                "one of them"
            )

    def without_keys(self) -> ServeOptions:
        """Return these options for a process that gets the image from the cache."""
        return replace(self, key=None, key_command=None, allow_plain=False)
