"""Which pages are not at the destination, as a control connection carries it: packed page sets, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from pageferry._engine import PageSet
from pageferry.errors import ProtocolError
from pageferry.migration.channel import Channel
from pageferry.migration.messages import MISSING_CHUNK, Missing

PACKING = 256
"""Bytes that a packed set may take besides its bitmap and a 256th of that: what its codec adds at the most."""


class MissingPages:
    """Sets of pages as they come; `pages`: of each region."""

    def __init__(self, pages: Sequence[int]) -> None:
        self._pages = list(pages)
        self._packed = bytearray()
        self.sets: list[PageSet] = []

    @property
    def complete(self) -> bool:
        """Whether there is a set for each region."""
        return len(self.sets) == len(self._pages)

    def add(self, message: Missing) -> None:
        """The next piece. Raises ProtocolError for one that is out of place, too long, or no set of pages."""
        if self.complete or message.region != len(self.sets):
            raise ProtocolError(f"missing pages of region {message.region}, after {len(self.sets)} regions")
        pages = self._pages[message.region]
        most = pages // 8 + pages // 2048 + PACKING
        if len(self._packed) + len(message.data) > most:
            raise ProtocolError(f"a set of {pages} pages in more than {most} bytes")
        self._packed += message.data
        if message.last:
            packed, self._packed = bytes(self._packed), bytearray()
            try:
                self.sets.append(PageSet.unpack(packed, pages))
            except ValueError as error:
                raise ProtocolError(f"missing pages of region {message.region}: {error}") from error


async def send_missing(channel: Channel, sets: Sequence[PageSet]) -> None:
    """Say which pages of each region are missing. Raises ConnectionLost."""
    for region, pages in enumerate(sets):
        packed = pages.pack()
        for start in range(0, max(len(packed), 1), MISSING_CHUNK):
            piece = packed[start : start + MISSING_CHUNK]
            await channel.send(Missing(region=region, data=piece, last=start + MISSING_CHUNK >= len(packed)))


async def receive_missing(channel: Channel, pages: Sequence[int]) -> list[PageSet]:
    """What `send_missing` says. Raises ProtocolError, ConnectionLost, PeerRefused."""
    missing = MissingPages(pages)
    while not missing.complete:
        missing.add(await channel.receive(Missing))
    return missing.sets
