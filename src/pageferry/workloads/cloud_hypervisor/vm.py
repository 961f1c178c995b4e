"""VM of Cloud Hypervisor that is saved while it runs (S4): the receiver of its local migration.

Cloud Hypervisor sends the files of its memory and its configuration before it pauses the VM, and waits for the reply to
the configuration. The VM runs until this side replies. `open` receives everything up to the configuration, `pause`
replies and receives the state, and `resume` completes the migration.

With `preserve_source`, Cloud Hypervisor keeps the VM, which is then paused, and `resume` makes it run again. Without
it, Cloud Hypervisor exits after the last reply. `complete` sends that reply when the image is complete. If this side
closes the connection earlier or replies with an error, Cloud Hypervisor resumes the VM if it was running.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from pageferry._engine import Pager, file_system_type
from pageferry.errors import PageferryError, UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host import files, proc
from pageferry.host.blocking import in_thread, on_thread
from pageferry.host.guardian import Guardian, PutRequest
from pageferry.host.peer_credentials import peer_credentials
from pageferry.memory import mappers
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE, Identity, Region, Segment
from pageferry.memory.view import Memory
from pageferry.pager.cloud_hypervisor.protocol import Channel, Closed, Command, InvalidMessage, Received, Status
from pageferry.pager.cloud_hypervisor.slots import MAX_SLOTS, SavedVm, Slot, parse_slots
from pageferry.workloads.cloud_hypervisor.api import PREFIX, TIMEOUT, Api, Ping, VmInfo
from pageferry.workloads.protocols import Faults, Live
from pageferry.workloads.qemu import direct_io

KIND = "cloud-hypervisor"
PRESERVES = 54
"""First major version that knows `preserve_source`. Earlier ones ignore it, and end the VM."""
_HUGETLBFS = 0x958458F6
_RESUME_TIMEOUT = 10.0
"""Maximum time from the last reply until the VM can be resumed, seconds."""
_RETRY = 0.001


class CloudHypervisorVm:
    """VM that waits for the pause of its local migration. `open` creates the object, `close` ends it."""

    def __init__(self, api: Api | None, channel: Channel, *, preserve: bool, version: Ping | None) -> None:
        self.pid = peer_credentials(channel.socket).pid
        self.name = str(api.path) if api is not None else f"process {self.pid}"
        self.regions: tuple[Region, ...] = ()
        self._api = api
        self._channel = channel
        self._preserve = preserve
        self._version = version
        self._config = b""
        self._state = b""
        self._slots: tuple[Slot, ...] = ()
        self._files: dict[int, int] = {}
        """Descriptors of the memory files, by slot."""
        self._guardian: Guardian | None = None
        self._was_paused = False
        self._ready = False
        """Whether the state was received, and the migration can be completed."""
        self._completed = False
        """Whether the migration is complete."""

    @classmethod
    async def open(cls, path: Path, *, preserve: bool) -> Self:
        """Start a local migration to this process, and receive the memory and the configuration. The VM keeps running.

        Raises WorkloadDied, WorkloadError, UnsupportedError if the memory is not shared or `preserve_source` is not
        known to this version.
        """
        api = Api(path)
        version, info = await in_thread(api.ping), await in_thread(api.info)
        _check(api, version, info, preserve)
        with _Listener(await in_thread(api.process)) as listener:
            request = {"destination_url": f"unix:{listener.path}", "local": True}
            await in_thread(api.put, "vm.send-migration", request | ({"preserve_source": True} if preserve else {}))
            channel = await on_thread(lambda: listener.accept(path), listener.cut)
        return await cls._received(api, channel, preserve, version)

    @classmethod
    async def receive(cls, channel: Channel) -> Self:
        """Receive a VM whose migration another program has requested. `complete` ends the checkpoint: the VM stays
        paused until then. Raises WorkloadError, UnsupportedError."""
        return await cls._received(None, channel, preserve=False, version=None)

    @classmethod
    async def _received(cls, api: Api | None, channel: Channel, preserve: bool, version: Ping | None) -> Self:
        try:
            self = cls(api, channel, preserve=preserve, version=version)
        except BaseException:
            channel.close()
            raise
        try:
            await on_thread(self._receive_memory, channel.cut)
        except BaseException:
            self.close()
            raise
        return self

    # -- memory

    def _receive_memory(self) -> None:
        """Receive all requests up to `Config`, which is not answered yet."""
        with self._explaining():
            self._channel.socket.settimeout(TIMEOUT)
            self._expect(Command.START).close()
            self._channel.reply()
            while (received := self._channel.receive()).command is Command.MEMORY_FD:
                self._add_file(received)
                self._channel.reply()
            if received.command is not Command.CONFIG:
                raise InvalidMessage(f"unexpected command {received.command.name}, expected CONFIG")
            self._config = received.payload
            self._slots = parse_slots(self._config)
            self.regions = tuple(self._region(slot) for slot in self._slots)
            self._channel.socket.settimeout(None)

    def _add_file(self, received: Received) -> None:
        if received.slot in self._files or len(self._files) >= MAX_SLOTS:
            received.close()
            raise InvalidMessage(f"invalid MEMORY_FD: slot {received.slot} was sent twice, or there are too many")
        self._files[received.slot] = received.take()

    def _region(self, slot: Slot) -> Region:
        file = self._files.get(slot.slot)
        if file is None:
            raise InvalidMessage(f"the memory of slot {slot.slot} was not sent")
        found = os.fstat(file)
        if found.st_size < slot.file_length:
            raise InvalidMessage(
                f"the file of memory slot {slot.slot} has {found.st_size} bytes, expected {slot.file_length}"
            )
        page_size = found.st_blksize if file_system_type(file) == _HUGETLBFS else SMALL_PAGE
        if page_size not in (SMALL_PAGE, LARGE_PAGE):
            raise UnsupportedError(
                f"cannot save the VM of {self.name}: its memory has pages of {page_size >> 20} MiB; use "
                "`hugepage_size=2M`"
            )
        segments = tuple(self._segments(found, slot))
        if not segments:
            raise WorkloadError(
                f"cannot save the VM of {self.name}: process {self.pid} does not map memory slot {slot.slot}; "
                "see the log of Cloud Hypervisor"
            )
        return Region(slot.region, slot.size, file, slot.file_offset, page_size, segments)

    def _segments(self, file: os.stat_result, slot: Slot) -> list[Segment]:
        segments = []
        for mapping in proc.file_mappings(self.pid):
            if mapping.inode != file.st_ino or not mapping.shared or mapping.device != file.st_dev:
                continue
            start = max(mapping.offset, slot.file_offset)
            end = min(mapping.offset + mapping.length, slot.file_length)
            if start < end:
                address = mapping.address + start - mapping.offset
                segments.append(Segment(self.pid, address, end - start, start - slot.file_offset))
        return segments

    def open_memory(self) -> Memory:
        """Return the memory for reading. Raises WorkloadDied, WorkloadError."""
        return Memory(self)

    # -- protocols of workloads

    @property
    def identity(self) -> Identity:
        """Kind, name and version of the VM."""
        version = self._version
        details = {"version": version.version, "build": version.build_version} if version is not None else {}
        return Identity(KIND, self.name, details)

    @property
    def live(self) -> Live | None:
        """This VM."""
        return self

    @property
    def pager(self) -> Pager | None:
        """None: no contents are deferred. Cloud Hypervisor refuses a migration while it loads its memory on demand."""
        return None

    @property
    def registered(self) -> bool:
        """False: the VM has no name on this host."""
        return False

    @property
    def handed_out(self) -> bool:
        """False: the memory files have no name, and other processes that map them are found."""
        return False

    @property
    def stays_paused(self) -> bool:
        """Whether the VM was paused before the checkpoint, or is not preserved."""
        return self._was_paused or not self._preserve

    async def running(self) -> bool:
        """Return whether the VM runs. Raises WorkloadDied, WorkloadError."""
        return self._api is not None and (await in_thread(self._api.info)).state == "Running"

    def faults(self) -> Faults:
        """Return the page faults of all threads of Cloud Hypervisor."""
        return Faults(*proc.thread_faults(self.pid, proc.threads(self.pid)))

    async def check_mappers(self) -> None:
        """Raise WorkloadError if another process maps the memory for writing, such as a backend of vhost-user."""
        await in_thread(lambda: mappers.refuse_strangers(self.name, self.regions))

    async def does_direct_io(self) -> bool:
        """Return whether the VM may read disks with direct I/O. Raises UnsupportedError if a device pins memory."""
        return bool(await in_thread(direct_io.direct_files, self.pid, self.name))

    async def drain(self) -> float | None:
        """Do nothing: a drain is required only for write traces, which a checkpoint of a VM does not use."""
        return None

    async def prepare_pause(self) -> None:
        """Start the guardian, which resumes a preserved VM if this process exits."""
        if self._preserve and self._guardian is None:
            self._guardian = await in_thread(Guardian, f"the VM of {self.name}")

    async def pause(self) -> None:
        """Make Cloud Hypervisor pause the VM, and receive its state. Raises WorkloadDied, WorkloadError."""
        await on_thread(self._pause, self._channel.cut)

    def _pause(self) -> None:
        with self._explaining():
            self._channel.reply()
            self._state = self._expect(Command.STATE).payload
            self._ready = True

    async def save_state(self) -> bytes:
        """Return the configuration and the state, as Cloud Hypervisor has sent them."""
        return SavedVm(config=self._config, state=self._state).encode()

    async def resume(self) -> None:
        """Complete the migration of a preserved VM, and resume the VM unless its user had paused it.

        Otherwise do nothing: the VM stays paused until `complete`. Raises WorkloadError if it cannot be resumed.
        """
        if self._preserve and self._ready:
            await on_thread(self._complete)

    async def complete(self) -> None:
        """Complete the migration of a VM that is not preserved, whose image is complete: Cloud Hypervisor exits."""
        if self._ready:
            await on_thread(self._complete)

    def _complete(self) -> None:
        self._ready = False
        with self._explaining():
            self._channel.reply()
            received = self._channel.receive()
            if received.command not in (Command.COMPLETE, Command.COMPLETE_PAUSED):
                raise InvalidMessage(f"unexpected command {received.command.name}, expected COMPLETE")
            self._was_paused = received.command is Command.COMPLETE_PAUSED
            resumes = self._api if self._preserve and not self._was_paused else None
            if resumes is not None and self._guardian is not None:
                self._guardian.plan([PutRequest(socket=str(resumes.path), path=PREFIX + "vm.resume")])
            self._channel.reply()
            self._completed = True
            if resumes is not None:
                self._resume(resumes)
                if self._guardian is not None:
                    self._guardian.plan([])

    def _resume(self, api: Api) -> None:
        """Resume the VM as soon as Cloud Hypervisor has ended the migration.

        Until then it refuses `vm.resume`, and `vm.info` returns the state before the migration."""
        deadline = time.monotonic() + _RESUME_TIMEOUT
        while True:
            try:
                api.put("vm.resume")
                return
            except WorkloadDied:
                raise
            except WorkloadError:
                if time.monotonic() > deadline:
                    if api.info().state == "Running":  # another client has resumed it
                        return
                    raise
                time.sleep(_RETRY)

    def close(self) -> None:
        """Close all files and sockets. If the migration is not complete, end it: Cloud Hypervisor then resumes the VM,
        unless its user had paused it."""
        if not self._completed:
            with contextlib.suppress(OSError):
                self._channel.reply(Status.ERROR)
        self._channel.close()
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            guardian.close()  # resumes the VM if that has failed
        while self._files:
            os.close(self._files.popitem()[1])

    # -- messages

    def _expect(self, command: Command) -> Received:
        received = self._channel.receive()
        if received.command is not command:
            received.close()
            raise InvalidMessage(f"unexpected command {received.command.name}, expected {command.name}")
        return received

    def _explaining(self) -> _Explaining:
        return _Explaining(self.name)


class _Explaining:
    """Context that translates errors of messages to errors of the checkpoint."""

    def __init__(self, name: str) -> None:
        self._prefix = f"cannot save the VM of {name}: "

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        match error:
            case Closed() | ConnectionError():
                raise WorkloadError(
                    f"{self._prefix}Cloud Hypervisor has ended the migration; see its log for the cause"
                ) from error
            case InvalidMessage():
                raise WorkloadError(f"{self._prefix}{error}; see the log of Cloud Hypervisor") from error
            case TimeoutError():
                raise WorkloadError(f"{self._prefix}no message within {TIMEOUT:.0f} s; see its log") from error
            case PageferryError():
                return
            case OSError():
                raise WorkloadError(f"{self._prefix}{error.strerror or error}") from error


class _Listener:
    """Socket to which one process can connect, in a private directory."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._folder = Path(tempfile.mkdtemp(prefix="pageferry-"))
        self.path = self._folder / "socket"
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            files.bind_private(self._socket, str(self.path))
            self._socket.listen(1)
            self._give_to(os.stat(f"/proc/{pid}").st_uid)
        except FileNotFoundError as error:
            self.close()
            raise WorkloadDied(f"cannot save the VM of process {pid}: it has exited") from error
        except BaseException:
            self.close()
            raise

    def _give_to(self, user: int) -> None:
        """Permit the user of Cloud Hypervisor to connect."""
        if user != os.geteuid():
            for path in (self.path, self._folder):
                os.chown(path, user, -1)

    def accept(self, api: Path) -> Channel:
        """Accept the connection of the process. Raises WorkloadError."""
        self._socket.settimeout(TIMEOUT)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            raise WorkloadError(
                f"cannot save the VM of {api}: Cloud Hypervisor has not connected within {TIMEOUT:.0f} s; see its log, "
                f"and check that it can access {self.path.parent.parent}"
            ) from None
        if peer_credentials(connection).pid != self._pid:
            connection.close()
            raise WorkloadError(f"cannot save the VM of {api}: another process has connected to {self.path}")
        return Channel(connection)

    def cut(self) -> None:
        """Interrupt `accept`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close and remove the socket."""
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(api: Api, version: Ping, info: VmInfo, preserve: bool) -> None:
    if info.state not in ("Running", "Paused"):
        raise WorkloadError(f"cannot save the VM of {api.path}: its state is {info.state}; start it first")
    if not info.shares_memory:
        raise UnsupportedError(
            f"cannot save the VM of {api.path}: its memory is private; start Cloud Hypervisor with `--memory shared=on`"
        )
    if preserve and version.major < PRESERVES:
        raise UnsupportedError(
            f"cannot save the VM of {api.path} and preserve it: Cloud Hypervisor {version.version} does not know "
            f"`preserve_source`, and would end the VM; use version {PRESERVES} or newer, or omit --preserve-source "
            "(in Python preserve_source)"
        )
