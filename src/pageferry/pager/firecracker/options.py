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
    on_demand: bool
    paused: bool


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
    on_demand: bool = False
    """Resume the VM of Cloud Hypervisor before its memory is loaded, and load accessed pages first; otherwise load all
    memory before."""
    paused: bool = False
    """Leave the VM of Cloud Hypervisor paused."""

    def __post_init__(self) -> None:
        OpenOptions.__post_init__(self)
        if self.eager and not self.prefetch:
            raise UsageError(
                "`eager` requires background loading, which --no-prefetch (in Python prefetch=False) disables; remove "
                "one of them"
            )

    def check_for_firecracker(self) -> None:
        """Raise UsageError for options that apply to Cloud Hypervisor only."""
        for name in ("on_demand", "paused"):
            if getattr(self, name):
                raise UsageError(f"`{name}` requires `cloud_hypervisor`; remove it")

    def check_for_cloud_hypervisor(self) -> None:
        """Raise UsageError for options that apply to Firecracker only, or only to loading on demand."""
        if self.microvms != 1:
            raise UsageError(
                "`microvms` requires `firecracker`: the socket of Cloud Hypervisor is for one VM; remove it"
            )
        if not self.prefetch and not self.on_demand:
            raise UsageError("loading only accessed pages requires `on_demand`; add it")

    def without_keys(self) -> ServeOptions:
        """Return these options for a process that gets the image from the cache."""
        return replace(self, key=None, key_command=None, allow_plain=False)
