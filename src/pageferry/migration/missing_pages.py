"""Transfer of the sets of missing pages over a control connection, packed and in chunks."""

from __future__ import annotations

from collections.abc import Sequence

from pageferry._engine import PageSet
from pageferry.errors import ProtocolError
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.messages import MISSING_CHUNK, Missing

PACKING = 256
"""Maximum overhead of a packed set, bytes, in addition to its bitmap and 1/256 of the bitmap."""


class MissingPages:
    """Page sets assembled from `Missing` messages. `pages`: number of pages of each region."""

    def __init__(self, pages: Sequence[int]) -> None:
        self._pages = list(pages)
        self._packed = bytearray()
        self.sets: list[PageSet] = []

    @property
    def complete(self) -> bool:
        """Whether the sets of all regions have been received."""
        return len(self.sets) == len(self._pages)

    def add(self, message: Missing) -> None:
        """Add the next chunk. Raises ProtocolError if it is out of order, too long, or not a valid page set."""
        if self.complete or message.region != len(self.sets):
            raise ProtocolError(
                f"the peer sent missing pages of region {message.region} after {len(self.sets)} regions"
            )
        pages = self._pages[message.region]
        most = pages // 8 + pages // 2048 + PACKING
        if len(self._packed) + len(message.data) > most:
            raise ProtocolError(f"the peer sent a set of {pages} pages in more than {most} bytes")
        self._packed += message.data
        if message.last:
            packed, self._packed = bytes(self._packed), bytearray()
            try:
                self.sets.append(PageSet.unpack(packed, pages))
            except ValueError as error:
                raise ProtocolError(
                    f"the peer sent invalid missing pages of region {message.region}: {error}"
                ) from error


async def send_missing(channel: Channel, sets: Sequence[PageSet]) -> None:
    """Send the missing pages, one set per region. Raises ConnectionLost."""
    for region, pages in enumerate(sets):
        packed = pages.pack()
        for start in range(0, max(len(packed), 1), MISSING_CHUNK):
            chunk = packed[start : start + MISSING_CHUNK]
            await channel.send(Missing(region=region, data=chunk, last=start + MISSING_CHUNK >= len(packed)))


async def receive_missing(channel: Channel, pages: Sequence[int]) -> list[PageSet]:
    """Receive the sets that `send_missing` sends. Raises ProtocolError, ConnectionLost, PeerRefused."""
    missing = MissingPages(pages)
    while not missing.complete:
        missing.add(await channel.receive(Missing))
    return missing.sets
