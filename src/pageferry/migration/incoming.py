"""Migration that this host has accepted, and the parameters of this host for receiving migrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pageferry.errors import WorkloadError
from pageferry.events import Listener, ignore
from pageferry.host.registry import Folder, Registry
from pageferry.host.stopwatch import Stopwatch
from pageferry.images.metadata import ImageIdentity
from pageferry.migration.message_order import MessageOrder
from pageferry.migration.options import MoveMemory
from pageferry.migration.ownership import CommitDecisions
from pageferry.migration.transport import messages
from pageferry.migration.transport.channel import Channel
from pageferry.workloads.protocols import Migratable

M = TypeVar("M", bound=messages.Message)


@dataclass(frozen=True, slots=True)
class BaseChoice:
    """Decision of the destination whether a clone shares the memory of an image on this host."""

    identity: ImageIdentity
    image: Path | None
    """Image on this host; None if the clone receives separate memory."""
    note: str = ""
    """Reason for separate memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivingHost:
    """Parameters of this host as a destination."""

    decisions: CommitDecisions
    """Records of the decisions of this host."""
    timeout: float = 30.0
    """Seconds of silence after which a peer counts as lost."""
    folder: Callable[[], Folder | None] = lambda: None
    """Function that returns the directory for records of post-copy, or None for a workload without a name."""
    listener: Listener = ignore
    registry: Registry = field(default_factory=Registry)
    """Run directory with the records of bases."""
    memory: MoveMemory = "auto"
    """Memory of a received clone: shared with its image if this host has it (`auto`), always shared, or separate
    (`own`)."""
    bases: Sequence[Path] = ()
    """Images whose memory received clones may share, and directories of such images."""


@dataclass(slots=True)
class Incoming:
    """Migration that this host has accepted."""

    channel: Channel
    hello: messages.Hello
    workload: Migratable
    order: MessageOrder
    base: BaseChoice | None = None
    """Choice of the memory of a clone; None for any other workload, and for a clone whose source sends all pages."""
    progress: Callable[[], int] = lambda: 0
    """Function that returns the number of bytes that the connections of disks have transferred."""
    times: Stopwatch = field(default_factory=lambda: Stopwatch("setup"))

    async def receive(self) -> messages.AnyMessage:
        """Return the next message. While bytes of disks are transferred, the wait is not limited: the source sends no
        messages until all disks have been copied once.

        Raises ProtocolError if the message is invalid in the current state, and the errors of `Channel.receive_any`.
        """
        message = await self.channel.receive_any(self.order.expected, self.progress)
        self.order.receive(message)
        return message

    async def receive_one(self, kind: type[M]) -> M:
        """Return the next message, in a state that permits only messages of this kind."""
        message = await self.receive()
        assert isinstance(message, kind), "checked by the order of messages"
        return message

    async def send(self, message: messages.Message) -> None:
        """Send a message. Raises ConnectionLost, and WrongState if the message is invalid in the current state."""
        self.order.send(message)
        await self.channel.send(message)


def compare_regions(workload: Migratable, regions: list[messages.RegionInfo]) -> None:
    """Compare the regions of both sides. Raises WorkloadError if they differ."""
    ours = [(region.name, region.length) for region in workload.regions]
    theirs = [(region.name, region.length) for region in regions]
    if ours != theirs:
        raise WorkloadError(
            f"cannot receive {workload.name}: the source has {_describe(theirs)}, the destination {_describe(ours)}; "
            "start the destination with the options of the source"
        )


def _describe(regions: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} of {length >> 20} MiB" for name, length in regions)
