"""Identity of a restored guest: its generation ID, and the time of its real-time clock.

A guest that is restored continues from an older state, and any number of guests can be restored from one image. A
restored guest therefore gets another generation ID by default, so that it discards its pool of random numbers (see
`workloads.qemu.generation_id`). The option `clock` selects the time of the RTC (see `workloads.qemu.rtc`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pageferry.pager.orders import Opened
from pageferry.workloads.qemu import generation_id, rtc
from pageferry.workloads.qemu.guest import QemuWorkload

log = logging.getLogger(__name__)


class RestoredIdentity:
    """Identity of one guest. `guid`: `new`, `image` or a GUID. `clock`: None to leave the command line unchanged."""

    def __init__(self, path: str, guid: str, clock: rtc.Clock | None) -> None:
        self._path = path
        self._guid = guid
        self._clock = clock
        self._chosen = ""

    async def command_line(self, arguments: Sequence[str], opening: asyncio.Future[Opened]) -> list[str]:
        """Return the command line with the chosen GUID and clock. Wait for the image only if they depend on it.

        Raises UsageError, for example if the image does not allow the choice, and ImageError.
        """
        details = None
        if self._guid == generation_id.IMAGE or self._clock is not None:
            details = (await opening).metadata.details
        self._chosen = generation_id.choose(self._guid, details, self._path)
        words = generation_id.with_guid(arguments, self._chosen)
        if self._clock is not None and details is not None:
            words += rtc.choose(self._clock, details, self._path)
        return words

    def check(self, workload: QemuWorkload, details: Mapping[str, Any]) -> None:
        """Raise WorkloadError if the guest, which has not run yet, has another GUID than the chosen one.

        A guest without a generation ID is reported by a warning. `details`: those of the image.
        """
        own = workload.generation_id
        generation_id.check_restored(self._chosen, self._guid, details.get(generation_id.DETAIL), own)
        if own is None:
            log.warning(
                "%s: without a vmgenid device, the guest repeats random numbers of other guests that are restored from "
                "this image, until its kernel reseeds; start guests with -device vmgenid",
                workload.name,
            )
