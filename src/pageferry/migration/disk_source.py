"""Copies of the disks of a workload at the source, made during the rounds of memory (`copy_disks`).

The workload copies its disks itself, over local sockets (`workloads.disk_copies`). A relay of the engine carries the
data of each socket over a connection to the destination. The pages and the relays share one bandwidth limit. The
switch-over waits until all disks have been copied once and the remaining writes can be sent within the maximum
downtime. The copies are completed in the pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Protocol, TypeVar

from pageferry._engine import BlockSender, Relay
from pageferry.errors import ConnectionLost, NotConverging, ProtocolError, UsageError
from pageferry.events import Listener
from pageferry.host.blocking import in_thread
from pageferry.host.fault_points import fault_point
from pageferry.migration import events
from pageferry.migration.options import Options
from pageferry.migration.statistics import megabits
from pageferry.migration.transport import messages
from pageferry.migration.transport.connection import PageStream
from pageferry.workloads.disk_copies import CopiesDisks, CopyProgress, DiskMirrors
from pageferry.workloads.protocols import DISKS, Migratable

T = TypeVar("T")

INTERVAL = 0.25
"""Interval of progress events, and of measurements while memory is sent, seconds."""
SHORT_INTERVAL = 0.02
"""Interval of measurements while only the copies of the disks are waited for, seconds."""
STALL = 60.0
"""Seconds without a new minimum of the remaining bytes after which copies count as stalled."""
MAX_BUFFER = 16 << 20
"""Maximum number of bytes of one disk in flight: 16 MiB fill a link of 1 Gbit/s with a round trip of 100 ms."""


class Transport(Protocol):
    """Connections of a migration that the copies use, as in `session.Link`."""

    @property
    def sender(self) -> BlockSender: ...


class DiskSource:
    """Copies of disks in one migration. `streams`: a connection to the destination for each disk."""

    def __init__(
        self,
        mirrors: DiskMirrors,
        streams: Sequence[PageStream],
        sender: BlockSender,
        options: Options,
        heard: Listener,
    ) -> None:
        self.mirrors = mirrors
        self._streams = list(streams)
        self._sender = sender
        self._options = options
        self._listener = heard
        self._relays: list[Relay] = []
        self._polling: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._alone = asyncio.Lock()
        """Lock that is held while QEMU is queried about the copies, and while the copies are paused."""
        self._awaited = asyncio.Event()
        """Event that is set while the migration waits for the first copy of all disks."""
        self._latest = CopyProgress(0, 0, ready=False)
        self._rate = 0.0
        """Highest rate so far at which the destination has confirmed contents, bytes per second."""
        self._least = float("inf")
        """Lowest nonzero number of remaining bytes since `_restart_stall`."""
        self._least_at = time.monotonic()

    async def start(self) -> None:
        """Start to copy. Raises WorkloadError, ConnectionLost."""
        async with self._limited("connect to the disks of the destination"):
            await self.mirrors.start(self._carry)
        self._polling = asyncio.ensure_future(self._poll())
        self._polling.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        fault_point("source.disks-begun")

    async def during(self, work: Awaitable[T]) -> T:
        """Return the result of `work`. If a disk cannot be copied, cancel `work`, and raise the error."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._polling), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self._polling.exception() or asyncio.CancelledError
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    # -- while the workload runs

    @property
    def sent(self) -> int:
        """Number of bytes sent for the disks."""
        return sum(relay.sent for relay in self._relays)

    async def wait_copied(self) -> None:
        """Wait until all disks have been copied once. Raises NotConverging."""
        self._awaited.set()
        while not self._latest.ready:
            self._check_converges()
            await asyncio.sleep(SHORT_INTERVAL)
        self._awaited.clear()

    async def wait_small(self, bandwidth: float) -> None:
        """Wait until the remaining writes can be sent within the maximum downtime. `bandwidth`: as for `rest`. Raises
        NotConverging."""
        self._restart_stall()  # nothing has waited for the copies until now
        await self.wait_copied()
        self._restart_stall()
        while (await self.rest(bandwidth))[1] > self._options.max_downtime:
            self._check_converges()
            await asyncio.sleep(SHORT_INTERVAL)
        fault_point("source.disks-copied")

    async def rest(self, bandwidth: float) -> tuple[int, float]:
        """Return the number of bytes left to copy now, and the expected time for sending them, seconds. `bandwidth`:
        rate of the page streams, used if it is higher than that of the disks so far."""
        progress = await self._measure()
        rate = max(self._rate, bandwidth)
        seconds = progress.remaining / rate if rate else float("inf")
        return progress.remaining, seconds if progress.remaining else 0.0

    @contextlib.asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Pause the copies during the block. QEMU stops the workload only when all requests to its disks and to the
        targets have completed, and requests to the targets wait for the link."""
        async with self._alone:
            await self.mirrors.pause()
            try:
                yield
            finally:
                await asyncio.shield(self.mirrors.resume())

    # -- the end

    async def stop_measuring(self) -> None:
        """End the measurements, so that they do not use the monitor in the pause."""
        self._polling.cancel()
        await asyncio.wait((self._polling,))
        if not self._polling.cancelled():
            self._polling.result()

    async def finish(self) -> None:
        """Complete the copies of the paused workload. Raises WorkloadError, ConnectionLost."""
        async with self._limited("complete the copies of the disks"):
            await self.mirrors.finish()
        fault_point("source.disks-finished")

    async def abandon(self) -> None:
        """Close the connections. The requests of the copies then fail, and no longer delay a pause of the workload."""
        self._polling.cancel()
        await in_thread(self.close)

    def close(self) -> None:
        """Close the connections."""
        for relay in self._relays:
            relay.close()
        for stream in self._streams:
            stream.close()

    @contextlib.asynccontextmanager
    async def _limited(self, operation: str) -> AsyncIterator[None]:
        """Limit the time of the block, in which the guest waits for a reply from the destination. Raises
        ConnectionLost."""
        try:
            async with asyncio.timeout(self._options.timeout):
                yield
        except TimeoutError as late:
            raise ConnectionLost(
                f"cannot {operation}: the destination has not replied within {self._options.timeout:g} s; check its "
                "disks and the link, and retry"
            ) from late

    # -- measurements

    def _carry(self, number: int, connection: socket.socket) -> None:
        self._relays.append(self._sender.relay(connection.fileno(), self._streams[number].handle))
        self._streams[number].close()  # the engine has duplicated the descriptor

    async def _measure(self) -> CopyProgress:
        async with self._alone:
            self._latest = await self.mirrors.progress()
        return self._latest

    async def _poll(self) -> None:
        before, sent, since = self._latest, self.sent, time.perf_counter()
        while True:
            now = await self._measure()
            if time.perf_counter() - since < INTERVAL and now.ready == before.ready:
                await self._wait()
                continue
            done, wire, at = now.done - before.done, self.sent - sent, time.perf_counter()
            # Zeros are confirmed without being sent; bytes in transit have been sent, but are not confirmed.
            self._rate = max(self._rate, min(done, wire) / max(at - since, 1e-6)) if sent else 0.0
            self._note(now)
            self._listener(
                events.DiskProgressEvent(
                    done=now.done,
                    total=now.total,
                    remaining=now.remaining,
                    ready=now.ready,
                    sent=self.sent,
                    mbps=megabits(wire, at - since),
                )
            )
            before, sent, since = now, self.sent, at
            await self._wait()

    async def _wait(self) -> None:
        """Wait until the next measurement."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(INTERVAL):
                await self._awaited.wait()
            await asyncio.sleep(SHORT_INTERVAL)

    def _note(self, now: CopyProgress) -> None:
        if now.remaining == 0:  # all is copied, or QEMU is still determining what to copy
            self._restart_stall()
        elif now.remaining < self._least:
            self._least, self._least_at = now.remaining, time.monotonic()

    def _restart_stall(self) -> None:
        self._least, self._least_at = float("inf"), time.monotonic()

    def _check_converges(self) -> None:
        """Raise NotConverging if the remaining bytes have not decreased for `STALL` seconds."""
        if time.monotonic() - self._least_at > STALL:
            raise NotConverging(
                "cannot complete the copies of the disks: the guest writes to its disks faster than they are copied "
                f"({self._rate / 2**20:.0f} MiB/s), and {self._latest.remaining >> 20} MiB remain; raise `bandwidth`, "
                "or reduce the writes of the guest"
            )


def check(workload: Migratable, options: Options) -> None:
    """Raise UsageError if an option for disks is set, and the workload is of a kind without disks."""
    default = Options()
    for name in ("copy_disks", "disks"):
        if getattr(options, name) != getattr(default, name) and not isinstance(workload, CopiesDisks):
            raise UsageError(f"`{name}` has no effect for {workload.name}: only guests have disks; remove the option")


def numbers_of(welcome: messages.Welcome, hello: messages.Hello, options: Options) -> Sequence[int]:
    """Return the indexes of the disks to copy, which the destination has chosen. Raises ProtocolError."""
    if not options.copy_disks:
        if welcome.copied is not None:
            raise ProtocolError("the peer expects copies of disks, which this migration does not send")
        return ()
    if welcome.copied is None and DISKS not in hello.details:
        return ()
    if welcome.copied is None:
        raise ProtocolError(
            "cannot copy disks: the release of the receiver is older and does not support this; use the same release "
            "of pageferry on both hosts"
        )
    if len(set(welcome.copied)) != len(welcome.copied):
        raise ProtocolError(f"the peer expects a disk twice: {list(welcome.copied)}")
    return welcome.copied


def buffer_of(options: Options, disks: int) -> int:
    """Return the maximum number of bytes in flight per disk: with a bandwidth limit, those of all disks together can be
    sent in half of the maximum downtime."""
    if not options.bandwidth or not disks:
        return MAX_BUFFER
    return min(int(options.bandwidth * options.max_downtime / 2 / disks), MAX_BUFFER)
