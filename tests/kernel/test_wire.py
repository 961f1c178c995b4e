"""Python binding of page streams: transfers over TCP, and the exceptions that the type stub documents."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry._engine import (
    LARGE_PAGE,
    SMALL_PAGE,
    BlockReceiver,
    BlockSender,
    Mapping,
    PageSet,
    Placer,
    TargetRegion,
    large_tmpfs,
)

PAGES = 700
_PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def memory(pages: int = PAGES) -> Mapping:
    made = os.memfd_create("test", os.MFD_CLOEXEC)
    fd = os.open(f"/proc/self/fd/{made}", os.O_RDWR | os.O_CLOEXEC)  # inotify does not report discards through `made`
    try:
        os.ftruncate(fd, pages * SMALL_PAGE)
        return Mapping(fd, pages * SMALL_PAGE)
    finally:
        os.close(fd)
        os.close(made)


@contextlib.contextmanager
def connected(streams: int) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """Yield both ends of `streams` loopback TCP connections."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ours = [stack.enter_context(socket.create_connection(server.getsockname())) for _ in range(streams)]
        yield ours, [stack.enter_context(server.accept()[0]) for _ in range(streams)]


def numbers(sockets: list[socket.socket]) -> list[int]:
    return [each.fileno() for each in sockets]


def fill(mapping: Mapping, page: int, byte: int) -> None:
    ctypes.memset(mapping.address + page * SMALL_PAGE, byte, SMALL_PAGE)


def contents(mapping: Mapping) -> bytes:
    return os.pread(mapping.fileno(), mapping.length, 0)


def page_set(pages: set[int]) -> PageSet:
    made = PageSet(PAGES)
    for page in pages:
        made.insert(page, page + 1)
    return made


FREED = st.sampled_from(["freed", "freed, and read again"])
_change = st.tuples(st.integers(0, 9) | st.integers(0, PAGES - 1), FREED | st.integers(0, 255))
_round = st.lists(_change, max_size=30)


@settings(max_examples=25)
@given(
    st.sampled_from(["none", "lz4", "zstd"]),
    st.sampled_from([1, 2, 4]),
    st.lists(_round, min_size=1, max_size=4),
)
def test_destination_matches_source_after_each_barrier(
    codec: str, streams: int, rounds: list[list[tuple[int, str | int]]]
) -> None:
    source, copy = memory(), memory()
    with connected(streams) as (ours, theirs):
        sender = BlockSender(numbers(ours), codec=codec, page_block=16384, storage_block=65536)
        receiver = BlockReceiver(numbers(theirs), Placer([TargetRegion(copy, SMALL_PAGE)], []))
        for number, changes in enumerate([[], *rounds]):
            written = set()
            for page, byte in changes:
                if isinstance(byte, str):  # a discard, which a trace does not report
                    assert _libc.fallocate(source.fileno(), _PUNCH, page * SMALL_PAGE, SMALL_PAGE) == 0
                    if byte != "freed":
                        assert ctypes.string_at(source.address + page * SMALL_PAGE, 1) == b"\0"
                    written.discard(page)
                else:
                    fill(source, page, byte)
                    written.add(page)
            pages = page_set(written) if number else PageSet.full(PAGES)
            sending = threading.Thread(target=sender.send, args=([source], [pages], number))
            sending.start()
            receiver.receive(number)
            sending.join()
            assert contents(copy) == contents(source)
        assert sender.progress == receiver.progress


def test_bandwidth_limit_and_codec_are_optional() -> None:
    """The limit applies to both streams together, and the contents are preserved."""
    source, copy = memory(), memory()
    view = memoryview(source)
    view[:] = random.Random(1).randbytes(PAGES * SMALL_PAGE // 2) + bytes(PAGES * SMALL_PAGE // 2)
    with connected(2) as (ours, theirs):
        sender = BlockSender(
            numbers(ours), codec="zstd", page_block=4096, storage_block=8192, bandwidth=2 << 20, adaptive=True
        )
        receiver = BlockReceiver(numbers(theirs), Placer([TargetRegion(copy, SMALL_PAGE)], []))
        begin = time.monotonic()
        sending = threading.Thread(target=sender.send, args=([source], [PageSet.full(PAGES)], 0))
        sending.start()
        receiver.receive(0)
        sending.join()
        # The last block of each stream may exceed the limit, and the sender may catch up after delays of up to 20 ms.
        assert time.monotonic() - begin >= (sender.progress.bytes - 3 * 8192) / (2 << 20) - 0.02
        assert contents(copy) == contents(source)
        assert sender.uncompressed <= sender.progress.blocks
    with connected(1) as (ours, _):
        assert BlockSender(numbers(ours), codec="lz4").uncompressed == 0


def receiver_of(end: socket.socket, timeout: float = 20.0) -> BlockReceiver:
    return BlockReceiver([end.fileno()], Placer([TargetRegion(memory(), SMALL_PAGE, [])], []), timeout)


def test_closed_peer_is_an_error() -> None:
    with connected(1) as ((ours,), (theirs,)):
        ours.close()
        with pytest.raises(ConnectionResetError, match="the peer closed the page stream"):
            receiver_of(theirs).receive(0)


def test_stalled_peer_times_out() -> None:
    with connected(1) as ((ours,), (theirs,)):
        ours.sendall(b"PFBK")
        with pytest.raises(TimeoutError, match="not transferred a byte"):
            receiver_of(theirs, 0.2).receive(0)


def test_peer_with_another_protocol_is_refused() -> None:
    with connected(1) as ((ours,), (theirs,)):
        ours.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\n\r\n" * 2)
        with pytest.raises(ValueError, match="not a storage block"):
            receiver_of(theirs).receive(0)


def test_receive_can_be_cancelled_by_another_thread() -> None:
    with connected(1) as (_, (theirs,)):
        receiver = receiver_of(theirs)
        threading.Timer(0.1, receiver.cancel).start()
        begin = time.monotonic()
        with pytest.raises(InterruptedError, match="cancelled"):
            receiver.receive(0)
        assert time.monotonic() - begin < 5


def test_sockets_with_a_timeout_work() -> None:
    """Python makes the descriptors of sockets with a timeout non-blocking."""
    source, copy = memory(), memory()
    fill(source, 3, 7)
    with connected(1) as ((ours,), (theirs,)):
        ours.settimeout(5)
        theirs.settimeout(5)
        sender = BlockSender([ours.fileno()])
        receiver = BlockReceiver([theirs.fileno()], Placer([TargetRegion(copy, SMALL_PAGE)], []))
        threading.Timer(0.3, sender.send, args=([source], [PageSet.full(PAGES)], 0)).start()
        receiver.receive(0)
    assert contents(copy) == contents(source)


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_full_destination_is_an_error(codec: str, root: None) -> None:
    """The error reports the cause, and the receiving process is not killed by SIGBUS."""
    directory = large_tmpfs(LARGE_PAGE)
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
    os.close(directory)
    os.ftruncate(fd, 2 * LARGE_PAGE)
    pages = 2 * LARGE_PAGE // SMALL_PAGE
    source, copy = memory(pages), Mapping(fd, 2 * LARGE_PAGE)
    os.close(fd)
    for page in range(pages):
        fill(source, page, 1 + page % 9)
    with connected(1) as ((ours,), (theirs,)):
        sender = BlockSender([ours.fileno()], codec=codec)
        receiver = BlockReceiver([theirs.fileno()], Placer([TargetRegion(copy, SMALL_PAGE, [True, True])], []))

        def send() -> None:
            with contextlib.suppress(ConnectionResetError, InterruptedError):
                sender.send([source], [PageSet.full(pages)], 0)

        sending = threading.Thread(target=send)
        sending.start()
        with pytest.raises(OSError, match=r"cannot allocate memory for pages 512 to \d+ of region 0") as full:
            receiver.receive(0)
        assert full.value.errno == errno.ENOMEM
        sender.cancel()
        sending.join()


def test_invalid_arguments_are_refused() -> None:
    with connected(1) as ((ours,), (theirs,)):
        fd = ours.fileno()
        with pytest.raises(ValueError, match="invalid codec"):
            BlockSender([fd], codec="brotli")
        for page_block in (0, 5000, 2 << 20):
            with pytest.raises(ValueError, match="page block"):
                BlockSender([fd], page_block=page_block)
        for storage_block in (0, 65537, 8 << 20):
            with pytest.raises(ValueError, match="storage block"):
                BlockSender([fd], storage_block=storage_block)
        for timeout in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="invalid timeout"):
                BlockSender([fd], timeout=timeout)
        with pytest.raises(ValueError, match="no sockets"):
            BlockSender([])
        with pytest.raises(ValueError, match="no sockets"):
            BlockReceiver([], Placer([], []))
        with pytest.raises(OSError, match="Bad file descriptor"):
            BlockSender([9999])
        sender = BlockSender([fd])
        for pages in ([], [PageSet(PAGES + 1)], [PageSet(PAGES)] * 2):
            with pytest.raises(ValueError, match="pages do not match the regions"):
                sender.send([memory()], pages, 0)
        assert theirs.fileno() >= 0
