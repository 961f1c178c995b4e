"""Copies of the disks of a running QEMU guest to the NBD server of another QEMU: one block job of QEMU per disk.

`blockdev-mirror` copies the whole disk, and then what the guest writes, in the background: a write of the guest never
waits for the copy. When a copy is *ready*, only later writes are left. In the pause, `block-job-cancel` makes a ready
job copy these writes, flush the target, and end with BLOCK_JOB_COMPLETED. The guest's device keeps its own disk.
(`job-complete` would attach the device to the target.) If the target fails, the job ends, and the guest runs on.

A job and its target have the same name. Until they are removed, the guardian of the guest removes them if this process
exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host import files
from pageferry.host.peer_credentials import peer_credentials
from pageferry.host.qmp import Monitor
from pageferry.workloads.disk_copies import CopiedDisk, CopyProgress
from pageferry.workloads.qemu.block_devices import BlockDevice
from pageferry.workloads.qemu.control import QemuControl
from pageferry.workloads.qemu.disk_exports import copied_disk, export_name

log = getLogger(__name__)

GRANULARITY = 64 << 10
"""Unit in which a job copies and tracks writes, bytes. A small unit leaves less to copy in the pause."""

_POLL = 0.002
"""Interval of checks whether a job has ended or is paused, seconds. QEMU has no event for the end of its requests."""
_CANCEL_TIMEOUT = 5.0
"""Maximum time for a cancelled job to end, seconds. Its connection is closed, so it waits only for reads."""
_PAUSE_TIMEOUT = 30.0
"""Maximum time for the requests in flight of a job that is being paused, seconds."""

_QUIET = frozenset({"paused", "standby"})
"""States of a paused job. A job enters them when its requests have completed."""
_JOB_EVENTS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
_SOCKET = "nbd"
"""Name of the socket to which QEMU connects, in a private directory."""


class QemuMirrors:
    """Block jobs that copy disks. `devices`: disks to copy, by number. `pid`: process of QEMU. `buffer`: maximum number
    of bytes in flight per job."""

    def __init__(self, control: QemuControl, pid: int, devices: Mapping[int, BlockDevice], buffer: int) -> None:
        self.disks: Sequence[CopiedDisk] = tuple(map(copied_disk, devices.values()))
        self._control = control
        self._pid = pid
        self._devices = {export_name(number): device for number, device in devices.items()}
        self._buffer = max(buffer, GRANULARITY)

    async def start(self, carry: Callable[[int, socket.socket], None]) -> None:
        """Connect QEMU to the exports of the destination, and start the jobs. `carry`: function that forwards the bytes
        of a connection. Raises WorkloadError, WorkloadDied."""
        if not self._devices:
            return
        self._control.start_guardian()
        async with self._control.session() as monitor:
            for name in self._devices:  # left by a migration whose command was killed together with its guardian
                await _remove(monitor, name)
            self._control.plan_mirrors(tuple(self._devices))
            for number, (name, device) in enumerate(self._devices.items()):
                await self._connect(monitor, name, lambda connection, number=number: carry(number, connection))  # type: ignore[misc]
                await self._mirror(monitor, name, device)

    async def progress(self) -> CopyProgress:
        """Return the progress of all jobs. Raises WorkloadError with QEMU's message if a job has failed."""
        if not self._devices:
            return CopyProgress(0, 0, ready=True)
        async with self._control.session() as monitor:
            jobs = await self._jobs(monitor)
        return CopyProgress(
            done=sum(job["offset"] for job in jobs),
            total=sum(job["len"] for job in jobs),
            ready=all(job["ready"] for job in jobs),
        )

    async def pause(self) -> None:
        """Pause the jobs, and wait until none of their requests is in flight. Raises WorkloadError."""
        async with self._control.session() as monitor:
            for name in self._devices:
                await monitor.execute("block-job-pause", device=name)
            deadline = time.monotonic() + _PAUSE_TIMEOUT
            while not all(job["status"] in _QUIET for job in await self._jobs(monitor)):
                if time.monotonic() > deadline:
                    raise WorkloadError(
                        f"cannot pause the copies of disks: a request has been in flight for {_PAUSE_TIMEOUT:g} s; "
                        "retry when the disk responds"
                    )
                await asyncio.sleep(_POLL)

    async def resume(self) -> None:
        """Resume the jobs. Raises WorkloadError."""
        async with self._control.session() as monitor:
            for name in self._devices:
                await monitor.execute("block-job-resume", device=name)

    async def finish(self) -> None:
        """Complete the copies of a paused guest, and remove the jobs and their targets.

        Raises WorkloadError if a copy is incomplete, WorkloadDied if QEMU exits.
        """
        if not self._devices:
            return
        monitor = await self._control.hold()
        with monitor.events(*_JOB_EVENTS) as ended:
            await self._jobs(monitor)  # raises if a job has failed
            await asyncio.gather(*(monitor.execute("block-job-cancel", device=name) for name in self._devices))
            await self._all_completed(monitor, ended)
        # QEMU executes the commands in this order. Waiting for each reply would prolong the pause.
        await asyncio.gather(
            *(monitor.execute("job-dismiss", id=name) for name in self._devices),
            *(monitor.execute("blockdev-del", node_name=name) for name in self._devices),
        )
        self._control.plan_mirrors(())

    async def cancel(self) -> None:
        """End the jobs, and remove their targets. The connections of the targets have been closed."""
        if not self._control.mirrors:
            return
        with contextlib.suppress(WorkloadError, TimeoutError):  # otherwise the guardian retries
            async with asyncio.timeout(_CANCEL_TIMEOUT), self._control.session() as monitor:
                for name in self._devices:
                    await _remove(monitor, name)
                self._control.plan_mirrors(())

    # -- one job

    async def _connect(self, monitor: Monitor, name: str, carry: Callable[[socket.socket], None]) -> None:
        """Add a node for an export of the destination."""
        with self._listening(monitor) as (listening, path):
            accepting = asyncio.create_task(self._accept(listening, path, carry))
            # QEMU waits for the connection, and with it the guest: closing the socket ends the wait.
            accepting.add_done_callback(lambda _: listening.close())
            try:
                await monitor.execute(
                    "blockdev-add",
                    driver="nbd",
                    node_name=name,
                    server={"type": "unix", "path": path},
                    export=name,
                    discard="unmap",
                )
            except WorkloadError:
                if accepting.done() and not accepting.cancelled() and (cause := accepting.exception()) is not None:
                    raise cause from None
                raise
            finally:
                accepting.cancel()
                await asyncio.gather(accepting, return_exceptions=True)

    @contextlib.contextmanager
    def _listening(self, monitor: Monitor) -> Iterator[tuple[socket.socket, str]]:
        """Yield a socket on which QEMU can connect, and its path: in the directory of the monitor, which QEMU can
        reach. Raises WorkloadError.

        The user of QEMU may be able to write to that directory. The socket is therefore created in a subdirectory that
        only this user can write to: no entry of it can be replaced before its owner is changed.
        """
        folder = Path(monitor.path).absolute().parent / f".nbd-{secrets.token_hex(4)}"
        with contextlib.ExitStack() as stack:
            try:
                listening = stack.enter_context(socket.socket(socket.AF_UNIX))
                parent = stack.enter_context(files.private_folder(folder))
                listening.setblocking(False)
                files.bind_private(listening, f"/proc/self/fd/{parent}/{_SOCKET}")
                owner = os.stat(f"/proc/{self._pid}").st_uid
                if owner != os.geteuid():
                    os.chown(_SOCKET, owner, -1, dir_fd=parent, follow_symlinks=False)
                listening.listen(1)
            except OSError as error:
                raise WorkloadError(
                    f"cannot copy disks: cannot listen in {folder} for QEMU: {error.strerror}"
                ) from error
            yield listening, str(folder / _SOCKET)

    async def _accept(self, listening: socket.socket, path: str, carry: Callable[[socket.socket], None]) -> None:
        """Accept the connection of QEMU. Connections of other processes are closed."""
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(listening)
            with connection:
                pid = peer_credentials(connection).pid
                if pid == self._pid:
                    carry(connection)
                    return
            log.warning(
                "copies of disks: process %d, not QEMU, has connected to %s; its connection is closed", pid, path
            )

    async def _mirror(self, monitor: Monitor, name: str, device: BlockDevice) -> None:
        await monitor.execute(
            "blockdev-mirror",
            job_id=name,
            device=device.node,
            target=name,
            sync="full",
            copy_mode="background",
            granularity=GRANULARITY,
            buf_size=self._buffer,
            auto_dismiss=False,
        )

    async def _jobs(self, monitor: Monitor) -> list[dict[str, Any]]:
        """Return QEMU's description of the jobs. Raises WorkloadError if one has failed or was ended."""
        found = {job["device"]: job for job in await monitor.execute("query-block-jobs")}
        for name, device in self._devices.items():
            job = found.get(name)
            if job is None or job["status"] in ("aborting", "concluded", "null"):
                raise await _failure(monitor, name, device)
        return [found[name] for name in self._devices]

    async def _all_completed(self, monitor: Monitor, ended: EventListener) -> None:
        """Wait until all jobs have ended. Raises WorkloadError if one has not completed."""
        left = dict(self._devices)
        while left:
            event, data = await monitor.next_named_event(ended)
            if (device := left.pop(data["device"], None)) is None:
                continue  # a job of another client
            if event != "BLOCK_JOB_COMPLETED" or "error" in data or data["offset"] != data["len"]:
                raise await _failure(monitor, data["device"], device, data.get("error"))
        await self._all_concluded(monitor)

    async def _all_concluded(self, monitor: Monitor) -> None:
        """Wait until all completed jobs can be dismissed. Raises WorkloadError if one has failed."""
        while True:
            jobs = await _all_jobs(monitor)
            for name, device in self._devices.items():
                if name not in jobs or "error" in jobs[name]:
                    raise await _failure(monitor, name, device)
            if all(jobs[name]["status"] == "concluded" for name in self._devices):
                return
            await asyncio.sleep(_POLL)


async def _all_jobs(monitor: Monitor) -> dict[str, dict[str, Any]]:
    return {job["id"]: job for job in await monitor.execute("query-jobs")}


async def _job(monitor: Monitor, name: str) -> dict[str, Any] | None:
    return (await _all_jobs(monitor)).get(name)


async def _failure(monitor: Monitor, name: str, device: BlockDevice, said: str | None = None) -> WorkloadError:
    """Return the error for a job that has failed or was ended by another client."""
    job = await _job(monitor, name)
    cause = said or (job or {}).get("error") or "its block job was ended by another client of the monitor"
    return WorkloadError(f"cannot copy the disk {device.layers[0].path} ({device.shown}): {cause}")


async def _remove(monitor: Monitor, name: str) -> None:
    """Remove a job and its target, if they exist."""
    deadline = time.monotonic() + _CANCEL_TIMEOUT
    while (job := await _job(monitor, name)) is not None and time.monotonic() < deadline:
        command = "job-dismiss" if job["status"] == "concluded" else "job-cancel"
        with contextlib.suppress(WorkloadError):
            await monitor.execute(command, id=name)
        await asyncio.sleep(_POLL)
    try:
        await monitor.execute("blockdev-del", node_name=name)
    except WorkloadDied:
        raise
    except WorkloadError:
        pass  # the target was not added
