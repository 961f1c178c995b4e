"""Tests of the list of io_uring's registered buffers in /proc/PID/fdinfo, which the kernel may omit."""

from __future__ import annotations

import pytest

from pageferry.workloads.direct_io import parse_buffers

HEAD = b"pos:\t0\nflags:\t02000002\nSqThread:\t-1\nUserFiles:\t0\n"
TAIL = b"\nPollList:\nCqOverflowList:\n"


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (b"UserBufs:\t0", []),
        (b"UserBufs:\t1\n    0: 0x7f0000001000/65536", [(0x7F0000001000, 65536)]),
        (b"UserBufs:\t3\n    0: 0x1000/1\n    1: <none>\n   12: 0x5000/8192", [(0x1000, 1), (0x5000, 8192)]),
    ],
)
def test_complete_list_is_parsed(listed: bytes, expected: list[tuple[int, int]]) -> None:
    assert parse_buffers(HEAD + listed + TAIL) == expected


@pytest.mark.parametrize("listed", [b"", b"UserBufs:\t1", b"UserBufs:\t2\n    0: 0x1000/1"])
def test_omitted_list_is_detected(listed: bytes) -> None:
    assert parse_buffers(HEAD + listed + TAIL) is None
