"""Tests of the connection to a pager of a base that another command has started."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from pageferry.checkpoints import sharing_memory
from pageferry.checkpoints.restore_options import GuestOptions
from pageferry.errors import RestoreError
from pageferry.host.registry import Folder, Registry
from pageferry.images.metadata import ImageIdentity
from pageferry.pager import orders
from pageferry.pager.launcher import PagerConnection
from pageferry.pager.orders import BaseElsewhere, BaseOpened
from pageferry.workloads.qemu.guest import QemuWorkload

OPENED = BaseOpened(
    pager=os.getpid(), descriptor=7, device=1, inode=2, identity=ImageIdentity(id="01" * 16, digest="02" * 8)
)


class Workload:
    """Guest without memory. `refusal`: error of `share_base`."""

    regions = ()
    pid = os.getpid()

    def __init__(self, refusal: RestoreError | None = None) -> None:
        self._refusal = refusal

    async def share_base(self, *_: object) -> None:
        if self._refusal is not None:
            raise self._refusal


class Own(PagerConnection):
    """Pager of this command, whose replies to `OpenBase` are given."""

    def __init__(self, *replies: BaseOpened | BaseElsewhere) -> None:
        ours, self.theirs = socket.socketpair()
        super().__init__(ours, os.getpid())
        self.replies = list(replies)

    async def open_base(self, _: Registry) -> BaseOpened | BaseElsewhere:
        return self.replies.pop(0)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Yield the socket of the pager that another command has started."""
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(str(tmp_path / "pager.sock"))
        found.listen(4)
        found.settimeout(30)
        yield found


def share(own: Own, tmp_path: Path, workload: Workload) -> PagerConnection:
    folder, guest = Folder(Registry(tmp_path), "web"), cast("QemuWorkload", workload)
    return asyncio.run(sharing_memory.share(guest, own, folder, "/image", GuestOptions(memory="shared")))


def at(listener: socket.socket) -> BaseElsewhere:
    return BaseElsewhere(socket=listener.getsockname(), pager=os.getpid())


def test_base_of_an_exiting_pager_is_served_by_the_own_pager(listener: socket.socket, tmp_path: Path) -> None:
    own = Own(at(listener), at(listener), OPENED)

    def close_clients() -> None:
        for _ in range(2):
            listener.accept()[0].close()

    exiting = threading.Thread(target=close_clients)
    exiting.start()
    assert share(own, tmp_path, Workload()) is own
    exiting.join()
    own.close()
    own.theirs.close()


def test_connection_is_closed_if_the_memory_cannot_be_shared(listener: socket.socket, tmp_path: Path) -> None:
    ended: list[object] = []

    def serve() -> None:
        with listener.accept()[0] as connection:
            connection.settimeout(30)
            assert isinstance(orders.receive_order(connection), orders.OpenBase)
            orders.send(connection, OPENED)
            ended.append(orders.receive_order(connection))

    serving = threading.Thread(target=serve)
    serving.start()
    own = Own(at(listener))
    with pytest.raises(RestoreError, match="refused"):
        share(own, tmp_path, Workload(RestoreError("refused")))
    serving.join()
    assert ended == [None]
    own.theirs.close()
