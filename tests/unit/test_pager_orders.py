"""Tests of the messages between a command and its pager process."""

from __future__ import annotations

import socket

import pytest

from pageferry.errors import ImageError, PageferryError, RestoreError, UsageError
from pageferry.images.metadata import ImageIdentity
from pageferry.pager import orders
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.records import Deferred, OwnImage

IDENTITY = ImageIdentity(id="01" * 16, digest="02" * 8)
WORK = Deferred(
    image="/image",
    identity=IDENTITY,
    qmp_socket=None,
    regions=[],
    userfaults={4711: 9},
    prefetch=True,
    eager=False,
    cold=[[(0, 2 << 20)]],
    own=[OwnImage(path="/image", identity=IDENTITY)],
)


@pytest.mark.parametrize(
    "order",
    [
        orders.Open(path="/image", expected=IDENTITY, name="web"),
        orders.Serve(registry="/run", name="web", work=WORK, taken_over=True),
        orders.Load(work=WORK),
        orders.Fill(),
        orders.Evict(region=1, pages=bytes(range(256)) * 4096),
        orders.EndEvictions(),
    ],
    ids=lambda order: type(order).__name__,
)
def test_order_is_received_as_sent(order: orders.AnyOrder) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        orders.send(ours, order)
        assert orders.receive_order(theirs) == order


def test_end_of_the_connection_is_no_message() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(b"\x10\0\0")
        assert orders.receive_order(theirs) is None
        assert orders.receive_reply(theirs) is None


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (CannotHandleFaults("denied"), CannotHandleFaults),
        (ImageError("denied"), ImageError),
        (UsageError("denied"), UsageError),
        (PermissionError("denied"), RestoreError),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_failure_keeps_its_class_and_message(raised: Exception, expected: type[PageferryError]) -> None:
    error = orders.Failed(kind=type(raised).__name__, message=str(raised)).error()
    assert type(error) is expected
    assert str(error) == "denied"
