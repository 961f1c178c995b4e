"""Options of restores."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, get_args

from pageferry import values
from pageferry.checkpoints.options import RESTORED_DISKS, Memory, check_loading
from pageferry.errors import UsageError
from pageferry.options import Text
from pageferry.stores.options import OpenArguments, OpenOptions
from pageferry.workloads.arena.options import ArenaArguments, ArenaOptions
from pageferry.workloads.qemu import generation_id, rtc


class GuestArguments(OpenArguments, total=False):
    """Keyword arguments of `restore_guest` for the fields of `GuestOptions`."""

    eager: bool
    prefetch: bool
    hugetlb: bool
    memory: Memory
    disks: values.Placed | str | None
    paused: bool
    resume: bool
    guid: str
    clock: rtc.Clock | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions(OpenOptions):
    """Options of the restore of a guest, the same as those of `pageferry restore`. Raises UsageError."""

    eager: bool = False
    """Load in the background at full speed, without yielding to accesses."""
    prefetch: bool = True
    """Load pages in the background; otherwise only accessed pages are loaded."""
    detach: bool = True
    """Run QEMU in a separate session, with its output in a log; otherwise on the terminal of this process."""
    hugetlb: bool = False
    """Place guest memory in reserved 2 MiB pages (hugetlbfs)."""
    memory: Memory = "own"
    """Separate memory for the guest, or private pages over one copy of the image's memory for all guests that are
    restored from the image (docs/clones.md)."""
    disks: Annotated[values.Placed | None, RESTORED_DISKS] = None
    """Require disks that are known to be unchanged since the checkpoint (`checked`), accept them as they are
    (`as-is`), or put a new overlay on each disk that was saved with the image (`overlay` or `overlay:DIR`); see
    docs/disks.md."""
    paused: bool = False
    """Leave the guest paused, even if it was running when it was saved."""
    resume: bool = False
    """Run the guest, even if it was paused when it was saved. Without `paused` and `resume`, the guest is in the state
    in which it was saved."""
    guid: Annotated[str, Text()] = generation_id.NEW
    """Generation ID of a guest with the device `vmgenid`: a random one (`new`), that of the image (`image`), or this
    GUID."""
    clock: rtc.Clock | None = None
    """Time from which the real-time clock continues: that of the host (`host`) or of the image (`image`). None: as
    `-rtc` in the command line specifies."""

    def __post_init__(self) -> None:
        OpenOptions.__post_init__(self)
        object.__setattr__(self, "guid", generation_id.check_choice("guid", self.guid))
        check_loading(self.eager, self.prefetch)
        if self.paused and self.resume:
            raise UsageError("`paused` cannot be combined with `resume`: remove one of them")
        if self.memory == "shared" and self.hugetlb:
            raise UsageError("`hugetlb` cannot be combined with shared `memory`: remove one of them")


class RestoreArguments(ArenaArguments, OpenArguments, total=False):
    """Keyword arguments of `restore` for the fields of `RestoredArenaOptions`, other than `name` and `memory`."""

    eager: bool
    prefetch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredArenaOptions(ArenaOptions):
    """Options of the restore of an arena. Raises UsageError."""

    eager: bool = False
    """Load in the background at full speed, without yielding to accesses."""
    prefetch: bool = True
    """Load pages in the background; otherwise only accessed pages are loaded."""
    memory: Memory = "own"
    """Separate memory for the arena, or private pages over one copy of the image's memory for all processes of this
    user that restore the image in this way (docs/clones.md)."""
    key: Path | None = None
    """File with the key of an image in a store (docs/stores.md)."""
    key_command: str | None = None
    """Command that prints what a file for `key` contains. It is run for each image, without a shell."""
    allow_plain: bool = False
    """With a key, also accept an image that is not encrypted."""

    def __post_init__(self) -> None:
        ArenaOptions.__post_init__(self)
        object.__setattr__(self, "key", self.keys.key)
        values.flag("eager", self.eager)
        values.flag("prefetch", self.prefetch)
        values.choice("memory", self.memory, get_args(Memory))
        if self.memory == "shared":
            self._check_shared()
        check_loading(self.eager, self.prefetch)

    @property
    def keys(self) -> OpenOptions:
        """Key of an image in a store."""
        return OpenOptions(key=self.key, key_command=self.key_command, allow_plain=self.allow_plain)

    def _check_shared(self) -> None:
        """Raise UsageError for options of `Arena`, because they would have no effect."""
        given = [field.name for field in fields(ArenaOptions) if getattr(self, field.name) != field.default]
        if given:
            raise UsageError(
                f"`{given[0]}` cannot be combined with shared `memory`, which cannot be saved or migrated: remove one "
                "of them"
            )
