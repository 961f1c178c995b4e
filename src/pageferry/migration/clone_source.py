"""Memory of a clone at the source of a migration (S2, S10).

The source names the image whose memory the clone shares in Hello. If the destination shares the memory of the same
image, the source sends the private pages, and names all other pages as absent. Otherwise, it sends all pages: the pager
loads the base in parts, ahead of sending them, as it does for a guest with deferred memory.

In both cases, the write trace covers the private pages. It reports pages that become private, so a page that was sent
from the base is sent again if the guest writes to it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pageferry._engine import Trace
from pageferry.errors import ProtocolError, UnsupportedError
from pageferry.host.blocking import in_thread
from pageferry.host.registry import Registry
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.migration.clone_reference import base_detail
from pageferry.migration.events import CloneMove
from pageferry.migration.options import MoveMemory, Options
from pageferry.migration.transport import messages
from pageferry.pager.base_client import connect_to_loader
from pageferry.pager.base_records import CloneRecord
from pageferry.pager.clone_memory import base_offsets
from pageferry.pager.launcher import PagerConnection
from pageferry.printable import printable
from pageferry.workloads.clone_view import PrivateMemory
from pageferry.workloads.protocols import BASE, BASE_REQUIRED

log = logging.getLogger(__name__)


class MovedClone(PrivateMemory):
    """Memory of a clone that is migrated. `mappings` contains its private pages; after `agree` without a base at the
    destination, the pages of the base too. `close` ends the trace."""

    def __init__(self, name: str, record: CloneRecord) -> None:
        super().__init__(name, record)
        self._opened = contextlib.ExitStack()

    def close(self) -> None:
        """Close the descriptors of the trace, and the connection to the pager of the base."""
        self._opened.close()
        self.mappings = self._ranges = []

    def large_units(self) -> list[list[bool]]:
        """Return no huge pages: private pages are base pages."""
        return [[False] * -(-region.length // LARGE_PAGE) for region in self.regions]

    def details(self, chosen: MoveMemory) -> dict[str, Any]:
        """Return the details in Hello that name the image, for the option `memory`."""
        if chosen == "own":
            return {}
        return base_detail(self.record.identity) | ({BASE_REQUIRED: True} if chosen == "shared" else {})

    def install_trace(self) -> Trace:
        """Install a write trace of the private pages. Raises WorkloadError if another operation traces the clone,
        UnsupportedError if its userfaultfd cannot trace writes, OSError."""
        userfaults = self._opened.enter_context(self.traceable("a migration"))
        try:
            return Trace(self.segments, userfaults=userfaults, private=True)
        except PermissionError as lacking:
            if lacking.errno != errno.EPERM:
                raise
            raise UnsupportedError(
                f"cannot migrate {self.name}: writes to its private pages cannot be traced ({lacking.strerror}); save "
                "it with `pageferry checkpoint`, and restore it at the destination"
            ) from lacking

    async def agree(self, welcome: messages.Welcome, hello: messages.Hello, options: Options) -> Agreement:
        """Choose the pages to send, according to the reply of the destination.

        Raises ProtocolError if the destination does not support what was requested, RestoreError, ImageError if the
        base cannot be loaded.
        """
        if welcome.shares_base and BASE not in hello.details:
            raise ProtocolError("the destination shares the memory of an image that the source has not named")
        if not welcome.shares_base and options.memory == "shared":
            raise ProtocolError(
                f"cannot share the memory of {self.record.image} at the destination: the release of the receiver is "
                "older and does not support this; use the same release of pageferry on both hosts, or --memory auto"
            )
        move = CloneMove(
            image=self.record.image,
            shared=welcome.shares_base,
            private=await in_thread(self.present),
            reason=None if welcome.shares_base else _reason(welcome, options),
        )
        if move.shared:
            return Agreement(move, None)
        log.warning("%s: all of its pages are sent: %s", self.name, move.reason)
        self.mappings = await in_thread(self.over_base)
        pager = await connect_to_loader(Registry(), Path(self.record.image), self.record.identity)
        self._opened.callback(pager.close)
        return Agreement(move, BaseLoader(pager, self.record))


@dataclass(frozen=True, slots=True)
class Agreement:
    """Result of `MovedClone.agree`."""

    move: CloneMove
    loader: BaseLoader | None
    """Pager that loads the base ahead of sending it; None if it is not sent."""


class BaseLoader:
    """Pager of a base, with the interface of `deferred_access.AcquiredPager`."""

    def __init__(self, pager: PagerConnection, record: CloneRecord) -> None:
        self.userfaults: dict[int, int] = {}
        self.large: list[list[bool]] = []
        self._pager = pager
        self._image = record.image
        self._offsets: Sequence[int] = base_offsets(record.regions)

    def ensure(self, region: int, first: int, count: int) -> None:
        """See `AcquiredPager`."""
        self._pager.ensure_now(self._offsets[region] + first * SMALL_PAGE, count * SMALL_PAGE, self._image)

    def cancel(self) -> None:
        """See `AcquiredPager`."""
        self._pager.close()

    def release(self) -> None:
        """See `AcquiredPager`."""
        self._pager.close()


def _reason(welcome: messages.Welcome, options: Options) -> str:
    if options.memory == "own":
        return "`memory` own was requested"
    return (
        printable(welcome.base_note) or "the release of the receiver is older, and does not share the memory of images"
    )
