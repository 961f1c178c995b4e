"""Pager process: loads the contents of a workload's memory, and outlives the command.

A command starts the pager process first, with `host.python`, so that the start of the interpreter overlaps with the
start of QEMU. Only the pager process opens the image. Its standard input is the socket for `orders`. Forking the
command would avoid the start of the interpreter, but a program with threads must not be forked (docs/decisions/0017).

The process exits when all contents are loaded, or when the workload exits; the pager of a base exits when no clone and
no client is left. If the process is killed, the workload waits at the next access to a missing page, because its
processes keep descriptors of their userfaultfds. The record and the deferred bitmap in the workload's directory allow
another pager to take over.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from pathlib import Path

from pageferry._engine import PageSet, end_on_truncation
from pageferry.errors import PageferryError, RestoreError, WorkloadError
from pageferry.host import files, proc
from pageferry.host.fault_points import fault_point
from pageferry.host.peer_credentials import peer_credentials
from pageferry.host.registry import Registry
from pageferry.images import targets
from pageferry.images.image import ImageFile
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import orders, records
from pageferry.pager.base_records import BaseFolder, CloneRecord
from pageferry.pager.base_service import BaseInUse, BaseService
from pageferry.pager.eager import load
from pageferry.pager.image_pager import ImagePager
from pageferry.printable import PrintableFormatter
from pageferry.stores.lazy_image import exit_process, open_image_file

log = logging.getLogger("pageferry.pager")

_START_TIMEOUT = 30.0
"""Maximum time to wait while another pager starts or stops serving a base, seconds."""


class Session:
    """Session that executes the orders of one command."""

    def __init__(self, connection: socket.socket, base: BaseService | None = None) -> None:
        self._connection = connection
        self._image: ImageFile | None = base.image if base is not None else None
        self.pager: ImagePager | None = None
        """Pager of the workload, after `Serve`."""
        self.base = base
        """Base of the image, after `OpenBase`."""
        self._shared: CloneRecord | None = None

    def until_serving(self) -> bool:
        """Execute orders until the process serves a workload or a base. Return False if the command closes the
        connection before that."""
        while self.pager is None and self.base is None and self._next():
            pass
        return self.pager is not None or self.base is not None

    def until_closed(self) -> None:
        """Execute orders until the command closes the connection, then continue as after `EndEvictions` and `Fill`."""
        try:
            while self._next():
                pass
        finally:
            if self.base is not None:
                self._fill_base(self.base)
                self.base.end_session()
            else:
                self._serving.end_evictions()
                self._serving.fill()
            self._connection.close()

    def _fill_base(self, base: BaseService) -> None:
        if self._shared is not None and self._shared.prefetch:
            base.fill(self._shared.eager)

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
            if isinstance(order, orders.Join) and isinstance(reply, orders.Joined):
                self._base.forget_program(order.name)  # the program has freed the memory before this record existed
            return False
        if isinstance(reply, orders.Opened):
            from pageferry.host import cgroups  # noqa: F401  # imported now, while QEMU starts: the import takes 30 ms
        return True

    def _carry_out(self, order: orders.AnyOrder) -> orders.AnyReply | None:
        match order:
            case orders.Open():
                return self._open(order)
            case orders.Serve():
                return self._serve(order)
            case orders.Load():
                return self._load(order)
            case orders.OpenBase() | orders.Share() | orders.Join() | orders.Ensure() | orders.GetBase():
                return self._carry_out_for_base(order)
            case orders.Fill() if self.base is not None:
                self._fill_base(self.base)
                return None
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

    def _carry_out_for_base(
        self, order: orders.OpenBase | orders.Share | orders.Join | orders.Ensure | orders.GetBase
    ) -> orders.AnyReply:
        match order:
            case orders.OpenBase():
                return self._open_base(Registry(Path(order.registry)))
            case orders.Share():
                self._base.share(order.name, order.work)
                self._shared = order.work
                return orders.Shared()
            case orders.Join():
                self._check_sender(order.work)
                self._base.join(order.name, order.work)
                self._shared = order.work
                return orders.Joined()
            case orders.Ensure():
                self._base.ensure(order.offset, order.length, order.image)
                return orders.Ensured()
            case orders.GetBase():
                return orders.BaseState(status=self._base.status())

    def _open_base(self, registry: Registry) -> orders.AnyReply:
        folder, deadline = BaseFolder.of(registry, self._opened.identity), time.monotonic() + _START_TIMEOUT
        while self.base is None:
            try:
                self.base = BaseService(self._opened, registry, serve_base)
                _log_to(self.base.folder.path)
            except BaseInUse:  # another pager is starting, serving or exiting
                if (elsewhere := _elsewhere(folder)) is not None:
                    return elsewhere
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        file = os.fstat(self.base.descriptor)
        return orders.BaseOpened(
            pager=os.getpid(),
            descriptor=self.base.descriptor,
            device=file.st_dev,
            inode=file.st_ino,
            identity=self.base.image.identity,
        )

    def _check_sender(self, work: CloneRecord) -> None:
        """Raise RestoreError if the record of a program was not sent by the process that it names."""
        sender = peer_credentials(self._connection).pid
        if sender != work.pid:
            raise RestoreError(
                f"cannot share memory with process {work.pid}: the request is from process {sender}; run the program "
                "in the PID namespace of the pager, or use separate memory (`own`)"
            )

    @property
    def _base(self) -> BaseService:
        if self.base is None:
            raise RestoreError("cannot execute the order: the pager does not serve a base")
        return self.base

    @property
    def _opened(self) -> ImageFile:
        if self._image is None:
            raise RestoreError("cannot execute the order: the pager has not opened an image")
        return self._image

    @property
    def _serving(self) -> ImagePager:
        if self.pager is None:
            raise RestoreError("cannot execute the order: the pager does not serve a workload")
        return self.pager

    def _open(self, order: orders.Open) -> orders.Opened:
        begin = time.monotonic()
        if self.base is not None:
            self.base.check_image(order.path)
        self._image = image = self._image or open_image_file(order.path)
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
        _log_to(folder.path)
        return orders.Serving()

    def _load(self, order: orders.Load) -> orders.Loading:
        regions = [records.open_region(record) for record in order.work.regions]

        def report(deferred: int, prefetched: int, bytes_read: int) -> None:
            progress = orders.Loading(deferred=deferred, prefetched=prefetched, bytes_read=bytes_read, finished=False)
            orders.send(self._connection, progress)

        pager = load(self._opened, targets.targets(self._opened, regions), report)
        counters = pager.counters
        return orders.Loading(deferred=0, prefetched=counters.prefetched, bytes_read=counters.bytes_read, finished=True)


def _elsewhere(folder: BaseFolder) -> orders.BaseElsewhere | None:
    """Return the address of the pager that serves a base; None if none has stored its record."""
    record = folder.load()
    if record is None or proc.start_time(record.pager) is None:
        return None
    return orders.BaseElsewhere(socket=folder.socket, pager=record.pager)


def serve_base(connection: socket.socket, base: BaseService) -> None:
    """Execute the orders of another command to the pager of a base, until the command closes the connection."""
    Session(connection, base).until_closed()


def _log_to(folder: Path) -> None:
    """Redirect standard error to the log, because no process reads the pipe from now on."""
    descriptor = files.open_private(folder / records.LOG, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def main(connection: socket.socket) -> int:
    """Serve the workload or the base of one command. Return the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("pageferry").setLevel(logging.INFO)
    logging.getLogger("qemu").setLevel(logging.CRITICAL)
    end_on_truncation(WorkloadError.exit_code)
    session = Session(connection)
    if not session.until_serving():
        return 0
    threading.Thread(target=session.until_closed, name="pageferry-orders", daemon=True).start()
    if session.base is not None:
        session.base.run()
        return 0
    assert session.pager is not None
    session.pager.run()
    session.pager.close()
    return 0


if __name__ == "__main__":
    exit_process(main(socket.socket(fileno=0)))
