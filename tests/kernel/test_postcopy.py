"""Pages fetched from a peer on demand, with a process that accesses them, its pager, and a page server.

Only the process accesses missing pages, and every wait for the process has a timeout.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from pageferry._engine import (
    LARGE_PAGE,
    SMALL_PAGE,
    MappedSegment,
    Mapping,
    Pager,
    PageServer,
    PageSet,
    PeerSource,
    Space,
    TargetRegion,
)
from tests.kernel.backing import KINDS, backing
from tests.kernel.programs import DEADLINE, wait_until
from tests.kernel.target import Target

LENGTH = 4 * LARGE_PAGE
PAGES = LENGTH // SMALL_PAGE
_OLD, _KEPT = 0xEE, 0x11


def content(page: int) -> int:
    """Return the byte that the source stores in a page."""
    return page % 200 + 20


@contextlib.contextmanager
def connections(streams: int = 2) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the descriptors of both ends of `streams` + 1 loopback connections; the first is for urgent pages."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ours = [stack.enter_context(socket.create_connection(server.getsockname())) for _ in range(streams + 1)]
        theirs = [stack.enter_context(server.accept()[0]) for _ in range(streams + 1)]
        yield [each.fileno() for each in ours], [each.fileno() for each in theirs]


@dataclass
class Scene:
    """Process some of whose pages are only at a source, and the arguments of a pager for this process."""

    target: Target
    kind: str
    source: Mapping
    ours: Mapping
    address: int
    missing: PageSet
    flags: int = field(init=False)
    userfault: int = field(init=False)
    number: int = field(init=False)

    def __post_init__(self) -> None:
        view, pages = (
            memoryview(self.source),
            [page for start, end in self.missing.runs() for page in range(start, end)],
        )
        for page in pages:
            view[page * SMALL_PAGE + 7] = content(page)
        self.target.order("write", self.address, list(range(PAGES)), _KEPT)
        self.target.order("write", self.address, pages, _OLD)
        self.flags = os.memfd_create("flags", os.MFD_CLOEXEC)
        os.ftruncate(self.flags, Pager.flags_length(PAGES))
        bits = bytearray(PAGES // 8)
        for page in pages:
            bits[page // 8] |= 1 << page % 8
        os.pwrite(self.flags, bits, 0)
        made = Space(self.target.pid).missing_faults(discards=True)
        assert made.number is not None
        self.userfault, self.number = made.descriptor, made.number

    @property
    def page_size(self) -> int:
        return LARGE_PAGE if self.kind == "hugetlb" else SMALL_PAGE

    def pager(self, source: PeerSource, userfault: int | None = None, *, taken_over: bool = False) -> Pager:
        space = Space(self.target.pid)
        return Pager(
            source,
            [TargetRegion(self.ours, self.page_size, self.source.large_units())],
            [MappedSegment(space, self.address, LENGTH)],
            {self.target.pid: self.userfault if userfault is None else userfault},
            self.flags,
            begin="taken-over" if taken_over else "kept",
        )

    def server(self, descriptors: list[int], missing: PageSet | None = None, codec: str = "lz4") -> PageServer:
        return PageServer(
            [self.source], [self.missing if missing is None else missing], descriptors[0], descriptors[1:], codec=codec
        )

    def expected(self, pages: list[int]) -> list[int]:
        return [content(page) if page in self.missing else _KEPT for page in pages]

    def check(self) -> None:
        everything = list(range(PAGES))
        assert self.target.order("peek", self.address, everything) == self.expected(everything)


@contextlib.contextmanager
def scene(kind: str, every: int = 1) -> Iterator[Scene]:
    """Yield a scene in which runs of 11 pages are missing, except in the first quarter of the memory (2 MiB)."""
    with backing(kind, LENGTH, 2) as (there, here), Target(here) as target:
        missing = PageSet(PAGES)
        for start in range(PAGES // 4, PAGES, 16 * every):
            missing.insert(start, start + 11)
        source, ours = Mapping(there, LENGTH), Mapping(here, LENGTH)
        made = Scene(target, kind, source, ours, target.order("map", here, LENGTH), missing)
        try:
            yield made
        finally:
            os.close(made.flags)
            os.close(made.userfault)


def shuffled(seed: int) -> list[int]:
    pages = list(range(PAGES))
    random.Random(seed).shuffle(pages)
    return pages[:600]


def lost(source: PeerSource | PageServer) -> str:
    end = time.monotonic() + DEADLINE
    while source.lost is None:
        assert time.monotonic() < end, "the connection was not lost"
        time.sleep(0.01)
    return source.lost


@pytest.mark.parametrize("kind", KINDS)
def test_process_reads_pages_of_its_peer(kind: str) -> None:
    with scene(kind) as made, connections() as (ours, theirs):
        source, server = PeerSource(ours[0], ours[1:]), made.server(theirs)
        server.start()
        pager = made.pager(source)
        pager.populate()
        pages = shuffled(1)
        assert made.target.order("peek", made.address, pages[:300]) == made.expected(pages[:300])
        # The PeerSource counts a request after sending it, so the server may count the request earlier.
        wait_until(lambda: 0 < server.requests <= source.requests, "the count of the last request")
        assert not source.ended
        assert len(pager.missing(0)) == pager.pending
        pushing = threading.Thread(target=server.push)
        pushing.start()
        assert made.target.order("peek", made.address, pages) == made.expected(pages)
        pushing.join(DEADLINE)
        assert pager.wait(DEADLINE)
        assert (server.remaining, pager.pending, source.lost, server.lost) == (0, 0, None, None)
        made.check()
        if kind == "large":
            assert Space(made.target.pid).large_mapped(made.address, LENGTH) == [(made.address, made.address + LENGTH)]
        # A page for which an access has waited may be received twice: by the push, and as the reply to a request.
        assert len(made.missing) <= source.progress.data <= len(made.missing) + server.requests


@pytest.mark.parametrize("kind", ["small", "hugetlb"])
def test_pager_reconnects_after_a_lost_connection(kind: str) -> None:
    with scene(kind) as made, connections() as (ours, theirs), connections(1) as (more, other):
        source = PeerSource(ours[0], ours[1:])
        pager = made.pager(source)
        first = made.missing.runs()[3][0]
        reading = threading.Thread(target=lambda: seen.extend(made.target.order("peek", made.address, [first, 0])))
        seen: list[int] = []
        reading.start()
        with socket.socket(fileno=os.dup(theirs[0])) as cut:
            cut.shutdown(socket.SHUT_RDWR)
        assert lost(source) == "the peer closed the page stream"
        with pytest.raises(ConnectionResetError, match="the peer closed the page stream"):
            pager.ensure(0, first, 1)
        packed = pager.missing(0).pack()
        server = made.server(other, PageSet.unpack(packed, PAGES))
        server.start()
        assert not seen
        pager.reconnect(PeerSource(more[0], more[1:]))
        reading.join(DEADLINE)
        assert seen == made.expected([first, 0])
        pager.ensure(0, PAGES // 2, PAGES // 4)
        assert not [page for page in range(PAGES // 2, PAGES * 3 // 4) if page in pager.missing(0)]
        server.push()
        assert pager.wait(DEADLINE)
        made.check()


def test_another_pager_takes_over() -> None:
    """The process itself keeps its userfaultfd open, through which the next pager resolves pending faults."""
    with scene("small") as made, connections() as (ours, theirs), connections(1) as (more, other):
        pager = made.pager(PeerSource(ours[0], ours[1:]))
        server = made.server(theirs)
        server.start()
        pages = shuffled(2)[:50]
        assert made.target.order("peek", made.address, pages) == made.expected(pages)
        pager.stop()
        seen: list[int] = []
        page = next(start for start, _ in pager.missing(0).runs())
        reading = threading.Thread(target=lambda: seen.extend(made.target.order("peek", made.address, [page])))
        reading.start()
        del pager, server
        userfault = Space(made.target.pid).descriptor(made.number)
        try:
            pager = made.pager(PeerSource(more[0], more[1:]), userfault, taken_over=True)
        finally:
            os.close(userfault)
        server = made.server(other, pager.missing(0), "zstd")
        server.start()
        reading.join(DEADLINE)
        assert seen == made.expected([page])
        server.push()
        assert pager.wait(DEADLINE)
        made.check()


def test_server_can_be_cancelled_and_refuses_malformed_requests() -> None:
    with scene("small", 8) as made, connections(1) as (ours, theirs), connections(1) as (more, other):
        server = made.server(theirs)
        server.start()
        server.cancel()
        with pytest.raises(InterruptedError):
            server.push()
        server = made.server(other)
        server.start()
        os.write(more[0], b"PFRQ" + bytes(28))
        assert lost(server) == "unexpected message on a page stream: a request with an invalid magic number or checksum"
        with pytest.raises(ValueError, match="a request with an invalid magic number or checksum"):
            server.push()
        assert ours


def test_invalid_arguments_are_refused() -> None:
    with scene("small", 8) as made, connections(1) as (ours, theirs):
        with pytest.raises(ValueError, match="missing pages do not match the regions"):
            PageServer([made.source], [PageSet(PAGES + 1)], theirs[0], theirs[1:])
        with pytest.raises(ValueError, match="expected none, lz4 or zstd"):
            made.server(theirs, codec="gzip")
        with pytest.raises(ValueError, match="no sockets"):
            PeerSource(ours[0], [])
        with pytest.raises(TypeError):
            Pager(None, [], [], {}, made.flags)  # type: ignore[arg-type]
        source = PeerSource(ours[0], ours[1:])
        with pytest.raises(ValueError, match="without a deferred bitmap"):
            Pager(source, [TargetRegion(made.ours, SMALL_PAGE)], [], {}, made.flags)
        pager = made.pager(source)
        with pytest.raises(ValueError, match="connection is in use by another pager"):
            pager.reconnect(source)
        with pytest.raises(ValueError, match="no such region: 1"):
            pager.missing(1)
        server = made.server(theirs)
        server.start()
        server.push()
        assert pager.wait(DEADLINE)
