"""Options of clones, and the names and command lines that they yield."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Required

from pageferry.checkpoints.options import RESTORED_DISKS, Clones, Memory, check_loading
from pageferry.errors import UsageError
from pageferry.host.registry import check_name
from pageferry.stores.options import OpenArguments, OpenOptions
from pageferry.values import Placed
from pageferry.workloads.qemu import addresses, placeholders, rtc


class CloneArguments(OpenArguments, total=False):
    """Keyword arguments of `clone` for the fields of `CloneOptions`."""

    count: Required[int]
    name: str
    memory: Memory
    eager: bool
    prefetch: bool
    disks: Placed | str | None
    clock: rtc.Clock | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneOptions(OpenOptions):
    """Options of clones, the same as those of `pageferry clone`. Raises UsageError."""

    count: Clones
    """Number of guests to start."""
    name: str = "clone-{n}"
    """Name of each guest; {n} stands for its number, from 1 on."""
    memory: Memory = "shared"
    """Private pages over one copy of the image's memory, or separate memory for each guest."""
    eager: bool = False
    """Load in the background at full speed, without yielding to accesses."""
    prefetch: bool = True
    """Load pages in the background; otherwise only accessed pages are loaded."""
    disks: Annotated[Placed | None, RESTORED_DISKS] = None
    """Require disks that are known to be unchanged since the checkpoint (`checked`), accept them as they are
    (`as-is`), or put a new overlay on each disk that was saved with the image (`overlay` or `overlay:DIR`); see
    docs/disks.md."""
    clock: rtc.Clock | None = None
    """Time from which the real-time clocks of the guests continue; None: as QEMU's `-rtc` specifies."""

    def __post_init__(self) -> None:
        OpenOptions.__post_init__(self)
        check_loading(self.eager, self.prefetch)
        for name in self.names:
            check_name(name)
        if len(set(self.names)) < self.count:
            raise UsageError(f"invalid `name` {self.name!r}: expected {{n}} in the name of {self.count} guests")

    @property
    def names(self) -> list[str]:
        """Names of the guests."""
        return [self.name.replace("{n}", str(number)) for number in range(1, self.count + 1)]

    def commands(self, arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
        """Return the name and the command line of each guest, in which {n} and {name} are replaced. Raises UsageError
        if two guests would listen on one address."""
        commands = [
            (name, placeholders.fill(arguments, {placeholders.NUMBER: str(number), placeholders.NAME: name}))
            for number, name in enumerate(self.names, 1)
        ]
        addresses.refuse_repeated(commands)
        return commands
