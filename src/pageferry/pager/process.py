"""Pager process: loads the contents of a workload's memory, and outlives the command.

A command starts the pager process first, with `host.python`, so that the start of the interpreter overlaps with the
start of QEMU. Only the pager process opens the image. Its standard input is the socket for `orders`. A fork of the
command would save the start of the interpreter, but a program with threads must not be forked (docs/decisions/0017).

The process exits when all contents are loaded, or when the workload exits. If it is killed, the workload waits at the
next access to a missing page, because its processes keep descriptors of their userfaultfds. The record and the deferred
bitmap in the workload's directory allow another pager to take over.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

from pageferry._engine import PageSet, end_on_truncation
from pageferry.errors import PageferryError, RestoreError, WorkloadError
from pageferry.host import files
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder, Registry
from pageferry.images import targets
from pageferry.images.image import ImageFile
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import orders, records
from pageferry.pager.eager import load
from pageferry.pager.image_pager import ImagePager
from pageferry.printable import PrintableFormatter

log = logging.getLogger("pageferry.pager")


class Session:
    """Session that executes the orders of one command."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._image: ImageFile | None = None
        self.pager: ImagePager | None = None
        """Pager of the workload, after `Serve`."""

    def until_serving(self) -> bool:
        """Execute orders until the process serves a workload. Return False if the command closes the connection before
        that."""
        while self.pager is None and self._next():
            pass
        return self.pager is not None

    def until_closed(self) -> None:
        """Execute orders until the command closes the connection, then continue as after `EndEvictions` and `Fill`."""
        try:
            while self._next():
                pass
        finally:
            self._serving.end_evictions()
            self._serving.fill()
            self._connection.close()

    def _next(self) -> bool:
        """Execute one order. Return False if the command has closed the connection, or does not receive replies."""
        order = orders.receive_order(self._connection)
        if order is None:
            return False
        try:
            reply = self._carry_out(order)
        except (PageferryError, OSError, ValueError) as error:
            reply = orders.Failed(kind=type(error).__name__, message=str(error))
        try:
            if reply is not None:
                orders.send(self._connection, reply)
        except OSError:
            return False
        if isinstance(reply, orders.Opened):
            from pageferry.host import cgroups  # noqa: F401  # imported now, while QEMU starts: it takes 30 ms
        return True

    def _carry_out(self, order: orders.AnyOrder) -> orders.AnyReply | None:
        match order:
            case orders.Open():
                return self._open(order)
            case orders.Serve():
                return self._serve(order)
            case orders.Load():
                return self._load(order)
            case orders.Fill():
                self._serving.fill()
                fault_point("pager.serving")
                return None
            case orders.Evict():
                region = self._serving.regions[order.region]
                pages = PageSet.unpack(order.pages, region.length // SMALL_PAGE)
                return orders.Evicted(pages=self._serving.service.pager.evict(order.region, pages))
            case orders.EndEvictions():
                pending = self._serving.service.pager.pending
                self._serving.end_evictions()
                return orders.Evicted(pages=pending)

    @property
    def _opened(self) -> ImageFile:
        if self._image is None:
            raise RestoreError("cannot execute the order: the pager has not opened an image yet")
        return self._image

    @property
    def _serving(self) -> ImagePager:
        if self.pager is None:
            raise RestoreError("cannot execute the order: the pager does not serve a workload yet")
        return self.pager

    def _open(self, order: orders.Open) -> orders.Opened:
        begin = time.monotonic()
        self._image = image = ImageFile(order.path)
        if order.expected is not None:
            targets.check_identity(image, order.expected, order.name)
        fault_point("pager.opened")
        return orders.Opened(
            identity=image.identity,
            metadata=image.metadata,
            pages=image.pages,
            state=image.state(),
            seconds=time.monotonic() - begin,
        )

    def _serve(self, order: orders.Serve) -> orders.Serving:
        from pageferry.host.cgroups import join_groups_of

        for failure in join_groups_of(order.work.regions[0].segments[0].pid):
            log.info("%s: memory is charged to the control group of this pager: %s", order.name, failure)
        folder = Registry(Path(order.registry)).folder(order.name)
        self.pager = ImagePager(self._opened, folder, order.work, taken_over=order.taken_over, evicting=order.evicting)
        fault_point("pager.taken-over")
        _log_to(folder)
        return orders.Serving()

    def _load(self, order: orders.Load) -> orders.Loading:
        regions = [records.open_region(record) for record in order.work.regions]

        def report(deferred: int, prefetched: int, bytes_read: int) -> None:
            progress = orders.Loading(deferred=deferred, prefetched=prefetched, bytes_read=bytes_read, finished=False)
            orders.send(self._connection, progress)

        pager = load(self._opened, targets.targets(self._opened, regions), report)
        counters = pager.counters
        return orders.Loading(deferred=0, prefetched=counters.prefetched, bytes_read=counters.bytes_read, finished=True)


def _log_to(folder: Folder) -> None:
    """Redirect standard error to the log, because no process reads the pipe from now on."""
    descriptor = files.open_private(folder.path / records.LOG, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def main(connection: socket.socket) -> int:
    """Serve the workload of one command."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("pageferry").setLevel(logging.INFO)
    logging.getLogger("qemu").setLevel(logging.CRITICAL)
    end_on_truncation(WorkloadError.exit_code)
    session = Session(connection)
    if not session.until_serving():
        return 0
    assert session.pager is not None
    threading.Thread(target=session.until_closed, name="pageferry-orders", daemon=True).start()
    session.pager.run()
    session.pager.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(socket.socket(fileno=0)))
