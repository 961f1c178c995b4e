"""Memory of a workload at the destination, with the parts of the engine that receive and place its pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from pageferry._engine import BlockReceiver, Placer, TargetRegion
from pageferry.errors import ProtocolError
from pageferry.memory.regions import LARGE_PAGE
from pageferry.memory.view import Memory
from pageferry.migration import preallocate
from pageferry.migration.engine_call import off_loop
from pageferry.migration.incoming import Incoming
from pageferry.migration.transport import messages
from pageferry.migration.transport.connection import PageStream

if TYPE_CHECKING:  # imported for clones only
    from pageferry.migration.clone_destination import StagingMemory

TargetMemory: TypeAlias = "Memory | StagingMemory"

POPULATE_WORKERS = 1
"""Number of threads that map complete units during the transfer. One suffices: mapping is much faster than
receiving."""


class Placement:
    """Placement of received pages in the memory of the workload."""

    def __init__(self, memory: TargetMemory, large: list[list[bool]], placer: Placer, receiver: BlockReceiver) -> None:
        self.memory = memory
        self.large = large
        """Whether each 2 MiB unit of each region is backed by a huge page at the source."""
        self.placer = placer
        self.receiver = receiver

    @property
    def is_clone(self) -> bool:
        """Whether the workload is a clone, whose pages are moved into its process after each round."""
        return not isinstance(self.memory, Memory)

    async def finish_round(self) -> None:
        """Place the pages of a round that has been received. Raises WorkloadDied, WorkloadError."""
        if self.is_clone:
            await off_loop(self.placer.move_private)

    @classmethod
    async def open(
        cls, incoming: Incoming, memory: TargetMemory, streams: Sequence[PageStream], timeout: float
    ) -> Placement:
        """Receive the LargePages messages, and prepare the memory for these huge pages and for the page streams. Raises
        MigrationError, WorkloadError."""
        hello, channel = incoming.hello, incoming.channel
        large = [await _large_pages(incoming, memory) for _ in hello.regions]
        handles = [stream.handle for stream in streams]
        if not isinstance(memory, Memory):
            placer = memory.placer()
            return cls(memory, large, placer, BlockReceiver(handles, placer, timeout))
        if hello.keep_large:
            await channel.during(preallocate.compact(memory.regions, large))
        placer = Placer(
            [
                TargetRegion(mapping, region.page_size, units)
                for mapping, region, units in zip(memory.mappings, memory.regions, large, strict=True)
            ],
            memory.segments,
            keep_large=hello.keep_large,
            workers=POPULATE_WORKERS if hello.populate == "all" else 0,
        )
        if hello.keep_large and hello.mode == "postcopy":
            await channel.during(preallocate.allocate(placer, large))
        return cls(memory, large, placer, BlockReceiver(handles, placer, timeout))

    def populated(self) -> messages.Populated:
        """Return the numbers of page-table entries populated so far, and the time spent."""
        done = self.placer.populated
        return messages.Populated(large=done.large, small=done.small, failed=done.failed, seconds=done.seconds)

    def close(self) -> None:
        """Cancel receiving, and release the objects of the engine at once: an exception may keep a reference to this
        object."""
        self.receiver.cancel()
        del self.placer, self.receiver


async def _large_pages(incoming: Incoming, memory: TargetMemory) -> list[bool]:
    message = await incoming.receive_one(messages.LargePages)
    return units_of(memory, message)


def units_of(memory: TargetMemory, message: messages.LargePages | messages.Hot) -> list[bool]:
    """Return, for each unit of the region, whether the bitmap in a message contains it. Raises ProtocolError if the
    bitmap does not match the region."""
    try:
        return messages.unpack_units(message.units, -(-memory.regions[message.region].length // LARGE_PAGE))
    except ValueError as error:
        raise ProtocolError(f"invalid bitmap of huge pages of region {message.region}: {error}") from error
