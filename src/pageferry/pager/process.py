"""Pager of a guest: a small process that loads the contents of its memory, and outlives the command.

Started by `host.python` with the arguments FD:PATH..., the open files of the image and of its parents, so that it reads
the same files that its caller has verified. It writes a `Serving` message to standard output when it has read their
indexes, then reads one `Order`, a line of JSON, from standard input, and writes `Serving` again once it handles every
access to missing memory. It exits when all contents are loaded, or with the guest. If it is killed, the guest waits at
the next access to a missing page. The guest keeps a descriptor of the userfaultfd, and the record and the deferred
bitmap in its directory allow another pager to take over.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from pageferry._engine import Pager, end_on_truncation
from pageferry.errors import ImageError, PageferryError, UsageError, WorkloadError
from pageferry.host import files, proc
from pageferry.host.cgroups import join_groups_of
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder, Registry
from pageferry.images import targets
from pageferry.images.image import ImageFile, open_link
from pageferry.images.working_set import WorkingSet
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE, Segment
from pageferry.pager import page_faults, records
from pageferry.pager.records import Deferred, OwnImage
from pageferry.pager.server import PagerServer
from pageferry.printable import PrintableFormatter

log = logging.getLogger("pageferry.pager")

_SYS_CLOSE, _SYS_MADVISE = 3, 28
_MADV_DOFORK = 11
_POLL = 0.05
"""Interval at which to check that the guest lives, seconds."""
_MOST_KEPT = 1 << 17
"""Maximum number of touched windows in the summary: 8 GiB of memory."""
_SELDOM = 0.5
"""Interval of these checks for the pager of a cold store, which rarely has work, seconds."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Request to take over a workload."""

    name: str
    """Name of the workload, which has a record of the restore."""
    touched: list[int] = []
    """Windows of the working set observed by the previous pager."""


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """Reply to an order."""

    error: str | None = None


class GuestPager:
    """Loads the memory of one guest. The first pager only serves accesses, so as not to delay the start of the guest.

    Raises RestoreError, WorkloadError, UsageError (another pager is running), CannotHandleFaults; nothing of it is left
    behind then.
    """

    def __init__(
        self, image: ImageFile, folder: Folder, work: Deferred, taken_over: bool = False, *, evicting: bool = False
    ) -> None:
        self.image = image
        self.folder = folder
        self.regions = [records.open_region(record) for record in work.regions]
        self.spaces = page_faults.open_spaces(segment.pid for region in self.regions for segment in region.segments)
        self.started = {pid: proc.start_time(pid) for pid in self.spaces}
        length = Pager.flags_length(image.pages)
        self.work = work
        ours = self._taken_over() if taken_over else self._adopt()
        try:
            self.flags = records.open_flags(folder, length) if taken_over else records.create_flags(folder, length)
            self.working_set = WorkingSet(image)
            self.touched: list[int] = []
            self.pager = self._begin(ours, taken_over, evicting)
        except BaseException:
            if not taken_over:
                page_faults.close(self.spaces, {}, self.work.userfaults)
            raise
        finally:
            for descriptor in ours.values():
                os.close(descriptor)
        fault_point("pager.registered")
        # Only now: a bitmap without a pager that has set it means that all pages are present. Not synced, because the
        # guest waits for this, and does not outlive the host.
        folder.store(records.RECORD, self.work, synced=False)
        socket_path = folder.socket_path(records.SOCKET)
        self.server = PagerServer(
            socket_path, self.pager, str(image.path), targets.extents(image), identity=image.identity
        )

    def _begin(self, ours: dict[int, int], taken_over: bool, evicting: bool) -> Pager:
        segments = [
            (self.spaces[segment.pid], segment.address, segment.length, number, segment.offset // SMALL_PAGE)
            for number, segment in self._watched()
        ]
        fill: Literal["none", "gentle", "eager"] = "none"
        if self.work.prefetch and taken_over:
            fill = "eager" if self.work.eager else "gentle"
        begin: Literal["empty", "kept", "taken-over"] = "empty" if self.work.cold is None else "kept"
        return Pager(
            self.image.chain,
            targets.targets(self.image, self.regions),
            segments,
            ours,
            self.flags,
            working_set=self.working_set.windows if self.work.prefetch and taken_over else [],
            fill=fill,
            begin="taken-over" if taken_over else begin,
            whole_blocks=self.work.cold is None,
            evicting=evicting,
            checks_removals=self.work.qmp_socket is None,
        )

    def _watched(self) -> Iterator[tuple[int, Segment]]:
        """Yield what this pager watches, with region numbers: every mapping, or the parts of them in a cold store."""
        for number, region in enumerate(self.regions):
            parts = [(0, region.length)] if self.work.cold is None else self.work.cold[number]
            for segment in region.segments:
                yield from ((number, part) for part in segment.within(parts))

    def _adopt(self) -> dict[int, int]:
        """Create a userfaultfd in every process, and record it. Return our descriptors of them."""
        ours, numbers = page_faults.userfaults(self.spaces)
        assert ours.keys() == numbers.keys(), "a guest is another process"
        self.work = msgspec.structs.replace(self.work, userfaults=numbers)
        return ours

    def _taken_over(self) -> dict[int, int]:
        """Return descriptors of the userfaultfds that the previous pager has left in every process."""
        return {pid: self.spaces[pid].descriptor(number) for pid, number in self.work.userfaults.items()}

    def run(self) -> None:
        """Serve until all contents are loaded, or the guest has exited."""
        known = 0
        poll = _POLL if self.work.cold is None else _SELDOM
        while not self.pager.wait(poll, known):
            if not all(proc.start_time(pid) == started for pid, started in self.started.items()):
                log.info("%s has ended", self.folder.name)
                self._remove_store()
                return
            if self.server.asked_to_stop.is_set():
                return
            failures = self.pager.failures
            if len(failures) > known:
                known = len(failures)
                self._complain(failures[known - 1])
        self._finish()

    def close(self) -> None:
        """Release the guest's memory. Missing pages stay missing, for another pager."""
        self.server.close()
        self.pager.stop()
        fcntl.flock(self.flags, fcntl.LOCK_UN)
        os.close(self.flags)
        del self.server, self.pager
        for region in self.regions:
            os.close(region.fd)

    def _complain(self, failure: tuple[int, int, bool, str]) -> None:
        log.error("%s: %s", self.folder.name, self.server.describe(failure))
        if failure[2] and self.work.qmp_socket is not None:
            from pageferry.pager.alarm import stop_guest

            paused = stop_guest(self.work.qmp_socket)
            log.error(
                "%s %s", self.folder.name, "is paused" if paused else "was told to pause, and waits at the access"
            )
            log.error(
                "to continue with an intact copy of the image, run: pageferry restore --takeover %s IMAGE",
                self.folder.name,
            )

    def _finish(self) -> None:
        fault_point("pager.settled")
        if self.work.cold is None:
            self.working_set.learn(self.touched + self.pager.touched, self.work.prefetch)
        else:
            self._make_large()
        status = self.server.status(touched=self.pager.touched[:_MOST_KEPT])
        self.folder.store(records.SUMMARY, status)  # before the record is removed: its readers then look for this
        # The record before the descriptors: no other pager could take over with the record alone.
        self.folder.forget(records.RECORD)
        fault_point("pager.forgotten")
        (self.folder.path / records.FLAGS).unlink(missing_ok=True)
        for pid, number in self.work.userfaults.items():
            with contextlib.suppress(OSError):
                self.spaces[pid].call(_SYS_CLOSE, number)
        fault_point("pager.closed")
        self._remove_store()
        log.info("%s: restore complete: %d faults, %d bytes read", self.folder.name, status.faults, status.bytes_read)

    def _make_large(self) -> None:
        """Collapse the split pages to huge pages again, where possible."""
        for number, segment in self._watched():
            if self.regions[number].page_size == SMALL_PAGE:
                space = self.spaces[segment.pid]
                for address in range(segment.address, segment.address + segment.length, LARGE_PAGE):
                    with contextlib.suppress(OSError):
                        space.collapse(address, LARGE_PAGE)
                if self.work.qmp_socket is None:
                    with contextlib.suppress(OSError):
                        space.call(_SYS_MADVISE, segment.address, segment.length, _MADV_DOFORK)

    def _remove_store(self) -> None:
        """Remove the images that reclaim has created, after their pages are reloaded or their workload has exited.

        Files that have replaced one of them are kept.
        """
        for own in self.work.own:
            if self._is_own(own):
                Path(own.path).unlink(missing_ok=True)

    def _is_own(self, own: OwnImage) -> bool:
        """Return whether the file at the path is that image: the one that is open, or one of the same identity."""
        try:
            found = os.lstat(own.path)
            opened = [os.fstat(link.image.fileno()) for link in self.image.links if link.identity == own.identity]
            return any(os.path.samestat(found, one) for one in opened) or (
                stat.S_ISREG(found.st_mode) and open_link(Path(own.path)).identity == own.identity
            )
        except (OSError, ImageError):
            return False


def _take_over(image: ImageFile, order: Order) -> GuestPager:
    folder = Registry().folder(order.name)
    work = folder.load(records.RECORD, Deferred)
    if work is None:
        raise UsageError(f"cannot start a pager for {order.name}: all of its memory is loaded")
    targets.check_identity(image, work.identity, order.name)
    for failure in join_groups_of(work.regions[0].segments[0].pid):
        log.info("%s: memory is charged to the control group of this pager: %s", order.name, failure)
    pager = GuestPager(image, folder, msgspec.structs.replace(work, image=str(image.path)), True)
    pager.touched = order.touched
    return pager


def _image(files: Sequence[str]) -> ImageFile:
    """Open the image from the files that were handed over, as FD:PATH. Raises ImageError."""
    opened = [(int(number), Path(path)) for number, _, path in (file.partition(":") for file in files)]
    try:
        return ImageFile.from_files(opened)
    finally:
        for number, _ in opened:
            os.close(number)


def _log_to(folder: Folder) -> None:
    """Redirect standard error to the log: no process reads it from here on."""
    descriptor = files.open_private(folder.path / records.LOG, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def main(orders: BinaryIO, answers: BinaryIO) -> int:
    """Execute one order."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("pageferry").setLevel(logging.INFO)
    logging.getLogger("qemu").setLevel(logging.CRITICAL)

    def answer(serving: Serving) -> None:
        answers.write(msgspec.json.encode(serving) + b"\n")
        answers.flush()

    try:
        end_on_truncation(WorkloadError.exit_code)
        image = _image(sys.argv[1:])
        fault_point("pager.opened")
        answer(Serving())
        line = orders.readline()
        if not line:  # the caller does not need this pager
            return 0
        pager = _take_over(image, msgspec.json.decode(line, type=Order))
    except (PageferryError, OSError, msgspec.MsgspecError) as error:
        answer(Serving(error=str(error)))
        return getattr(error, "exit_code", 1)
    fault_point("pager.taken-over")
    _log_to(pager.folder)
    answer(Serving())
    fault_point("pager.serving")
    answers.close()
    pager.run()
    pager.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer, sys.stdout.buffer))
