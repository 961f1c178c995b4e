"""Fake of Cloud Hypervisor's side of a local migration, and of its API socket, written from the interface.

As Cloud Hypervisor does, the program maps guest memory from memfds, sends them with the configuration before it pauses
the VM, and the state afterwards. As the receiver of a migration with `memory_mode` `Postcopy`, it registers the files
that it has received for MISSING and MINOR faults, requests every page in ascending order over the second connection,
with the faults of its guest among them, and maps a page when its request is answered.

By default it behaves as the worst version that was observed: `vm.send-migration` is accepted even if the migration
fails later, `vm.info` returns the old state during a migration, `vm.resume` is refused until it has ended, and SIGTERM
is ignored while the program waits for a migration. `Behaviour` describes how the messages deviate from correct ones.

The program executes one command per line of its standard input, and prints one JSON object for each.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("mmap", "memcpy"):
    getattr(_libc, _name).restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

PAGE, HUGE, GIANT = 4096, 2 << 20, 1 << 30
_SYS_USERFAULTFD, _USER_MODE_ONLY = 323, 1
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_WAKE, _UFFDIO_CONTINUE = 0xC018AA3F, 0xC020AA00, 0x8010AA02, 0xC020AA07
_MINOR_SHMEM, _MODE_MISSING, _MODE_MINOR = 1 << 10, 1, 4
START, CONFIG, STATE, COMPLETE, ABANDON, MEMORY_FD, COMPLETE_PAUSED, PAGE_FAULT = 1, 2, 3, 5, 6, 7, 8, 9
_OK, _ERROR = 1, 2


@dataclass(frozen=True)
class Behaviour:
    """Deviations from a correct version."""

    cut: int | None = None
    """Number of bytes after which the connection of a snapshot is closed."""
    end_after: int | None = None
    """Command of a snapshot after whose reply the connection is closed, or, of a restore, at which it is closed."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers to send instead, in hexadecimal, by command."""
    config: str | None = None
    """Payload of `Config` to send instead."""
    files: int = 1
    """Number of descriptors to send with `MemoryFd`."""
    shorten: int = 0
    """Number of bytes by which the files are shorter than the slots."""
    repeat: bool = False
    """Send the first slot twice."""
    preserves: bool = True
    """Know `preserve_source`."""
    refuse: int | None = None
    """Command of a restore that is answered with an error."""
    requests: list[str] = field(default_factory=list)
    """Messages to send on the second connection instead of requests, in hexadecimal."""
    flood: int = 0
    """Number of requests for the first page to send without waiting for the replies."""
    exit_after: int | None = None
    """Number of requests after which the program exits, with another one not answered."""
    close_after: int | None = None
    """Number of requests after which the second connection is closed."""
    no_prefault: bool = False
    """Request only the first page, and those that the guest accesses."""
    minor: bool = True
    """Register for MINOR faults too, and map pages by UFFDIO_CONTINUE. Version 53 only wakes the guest."""
    request: int = PAGE
    """Length of a requested page, bytes."""


def header(command: int, length: int = 0) -> bytes:
    """Return a request without its payload."""
    return struct.pack("<H6xQ", command, length)


def page_fault(gpa: int, length: int) -> bytes:
    """Return a request for a page."""
    return header(PAGE_FAULT, 16) + struct.pack("<QQ", gpa, length)


def config(slots: list[tuple[int, int, int, int]]) -> bytes:
    """Return the payload of `Config` for slots, each (slot, gpa, size, file_offset)."""
    mappings = [
        {"slot": slot, "gpa": gpa, "size": size, "zone_id": "mem0", "virtio_mem": False, "file_offset": offset}
        for slot, gpa, size, offset in slots
    ]
    memory = {"memory_ranges": {"data": []}, "guest_ram_mappings": mappings, "next_memory_slot": len(slots)}
    vm = {"cpus": {"boot_vcpus": 1}, "memory": {"size": sum(slot[2] for slot in slots), "shared": True}}
    return json.dumps({"vm_config": vm, "common_cpuid": [], "memory_manager_data": memory}).encode()


STATE_PAYLOAD = b'{"snapshots": {"cpu-manager": {"bytes": "\\u0000\xc3\xa4"}}}'


class Slot:
    """Memory slot, mapped from a file."""

    def __init__(self, number: int, gpa: int, size: int, offset: int, file: int) -> None:
        self.number, self.gpa, self.size, self.offset, self.file = number, gpa, size, offset, file
        huge = os.fstat(file).st_blksize
        self.page = huge if huge > PAGE else PAGE
        address = _libc.mmap(None, size, 3, mmap.MAP_SHARED, file, offset)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        self.address: int = address


class Vm:
    """Virtual machine whose guest is threads of this program."""

    def __init__(self, slots: list[Slot], payloads: tuple[bytes, bytes]) -> None:
        self.slots = slots
        self.config, self.state = payloads
        self.size = sum(slot.size for slot in slots)
        self.running = threading.Lock()
        """Held by a thread of the guest for each access, and by the monitor while the VM is paused."""
        self.paused = False
        self.writes = 0
        self.digest_at_pause = ""

    def at(self, position: int) -> int:
        """Return the address of a byte, counted over all slots."""
        for slot in self.slots:
            if position < slot.size:
                return slot.address + position
            position -= slot.size
        raise ValueError("no such byte")

    def read(self, position: int, length: int) -> bytes:
        """Read memory, without the lock of the interpreter."""
        buffer = ctypes.create_string_buffer(length)
        _libc.memcpy(buffer, self.at(position), length)
        return buffer.raw

    def write(self, position: int, contents: bytes) -> None:
        """Write memory, without the lock of the interpreter."""
        _libc.memcpy(self.at(position), contents, len(contents))

    def pause(self) -> None:
        """Pause the guest."""
        if not self.paused:
            self.running.acquire()
            self.paused = True

    def resume(self) -> None:
        """Resume the guest."""
        if self.paused:
            self.paused = False
            self.running.release()

    def digest(self, step: int = 1 << 20) -> str:
        """Return the digest of all memory, read from the files."""
        hashed = hashlib.sha256()
        for slot in self.slots:
            for at in range(slot.offset, slot.offset + slot.size, step):
                hashed.update(os.pread(slot.file, min(step, slot.offset + slot.size - at), at))
        return hashed.hexdigest()

    def sweep(self, order: list[int]) -> str:
        """Read pages through the mappings, in an order of positions. Return the digest of all pages, in order."""
        found: dict[int, bytes] = {}
        for position in order:
            with self.running:
                found[position] = hashlib.sha256(self.read(position, PAGE)).digest()
        return hashlib.sha256(b"".join(found[position] for position in sorted(found))).hexdigest()

    def churn(self, seed: int) -> None:
        """Write random pages until the end."""
        chance = random.Random(seed)
        while True:
            with self.running:
                self.write(chance.randrange(self.size // PAGE) * PAGE, struct.pack("<Q", self.writes) * 8)
                self.writes += 1
            time.sleep(0)


class Monitor:
    """Process of the VM: its migrations, as requested over the API socket."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.behaviour = Behaviour(**settings["behaviour"])
        self.version: str = settings["version"]
        self.vm: Vm | None = None
        self.migrating = False
        self.shared = settings["shared"]
        self.log: list[str] = []
        self.requests: list[tuple[int, int]] = []
        if settings["slots"]:
            self._boot([tuple(slot) for slot in settings["slots"]], settings)

    def _boot(self, layout: list[tuple[int, int, int, int]], settings: dict[str, Any]) -> None:
        files: dict[int, int] = {}
        for number, _, size, offset in layout:
            # Slots of one zone have a common file.
            zone = 0 if offset else number
            if zone not in files:
                flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if settings["hugetlb"] else 0)
                files[zone] = os.memfd_create("ch_ram", flags)
            needed = offset + size - self.behaviour.shorten
            os.ftruncate(files[zone], max(needed, os.fstat(files[zone]).st_size))
        slots = [
            Slot(number, gpa, size - self.behaviour.shorten, offset, files[0 if offset else number])
            for number, gpa, size, offset in layout
        ]
        self.vm = Vm(slots, (config(layout), STATE_PAYLOAD))
        contents = bytes.fromhex(settings["contents"])
        for position in range(0, self.vm.size if contents else 0, PAGE):
            number = position // PAGE
            if number % 4:
                self.vm.write(position, contents + struct.pack("<Q", number) * 64)

    # -- requests of the API

    def info(self) -> dict[str, Any]:
        assert self.vm is not None
        memory = {"size": self.vm.size, "shared": self.shared, "hugepages": False}
        state = "Running" if self.migrating or not self.vm.paused else "Paused"
        return {"config": {"memory": memory}, "state": state, "memory_actual_size": self.vm.size}

    def resume(self) -> None:
        if self.migrating or self.vm is None:
            raise ValueError("The VM is migrating and can't be modified")
        self.vm.resume()

    def send(self, body: dict[str, Any]) -> None:
        if self.migrating or self.vm is None or not body.get("local"):
            raise ValueError("migration refused")
        self.migrating = True
        preserve = body.get("preserve_source", False) and self.behaviour.preserves
        threading.Thread(target=self._send, args=(body["destination_url"], preserve), daemon=True).start()

    def receive(self, body: dict[str, Any]) -> None:
        postcopy = body.get("memory_mode") == "Postcopy"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(body["receiver_url"].removeprefix("unix:"))
        listener.listen()
        Receiver(self, listener, postcopy).run()

    # -- a snapshot

    def _send(self, url: str, preserve: bool) -> None:
        vm = self.vm
        assert vm is not None
        was_paused = vm.paused
        connection = Counted(socket.socket(socket.AF_UNIX), self.behaviour.cut)
        try:
            connection.socket.connect(url.removeprefix("unix:"))
            self._send_vm(vm, connection, was_paused)
        except (OSError, ValueError) as error:
            self.log.append(f"Migration failed: {error}")
            connection.socket.close()
            if not was_paused:
                vm.resume()
            self.migrating = False
            return
        connection.socket.close()
        if not preserve:
            os._exit(0)
        time.sleep(0.05)  # the request of the API is refused until the thread has been joined
        self.migrating = False

    def _send_vm(self, vm: Vm, connection: Counted, was_paused: bool) -> None:
        behaviour = self.behaviour
        self._request(connection, START)
        for slot in [*vm.slots, *vm.slots[: int(behaviour.repeat)]]:
            connection.send(self._header(MEMORY_FD, 4))
            files = [slot.file] * behaviour.files
            space = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(files)}i", *files))] if files else []
            connection.send(struct.pack("<I", slot.number), space)
            self._replied(connection, MEMORY_FD)
        self._request(connection, CONFIG, behaviour.config.encode() if behaviour.config is not None else vm.config)
        vm.pause()
        vm.digest_at_pause = vm.digest()
        self._request(connection, STATE, vm.state)
        self._request(connection, COMPLETE_PAUSED if was_paused else COMPLETE)

    def _header(self, command: int, length: int) -> bytes:
        changed = self.behaviour.headers.get(str(command))
        return bytes.fromhex(changed) if changed is not None else header(command, length)

    def _request(self, connection: Counted, command: int, payload: bytes = b"") -> None:
        connection.send(self._header(command, len(payload)))
        connection.send(payload)
        self._replied(connection, command)

    def _replied(self, connection: Counted, command: int) -> None:
        status, length = struct.unpack("<H6xQ", receive(connection.socket, 16))
        if status != _OK or length:
            raise ValueError(f"the receiver has replied to {command} with {status}")
        if command == self.behaviour.end_after:
            raise ValueError("ended")


class Counted:
    """Connection that is closed after a number of bytes."""

    def __init__(self, connection: socket.socket, limit: int | None) -> None:
        self.socket = connection
        self._left = limit

    def send(self, contents: bytes, ancillary: Any = ()) -> None:
        """Send bytes with ancillary data."""
        if self._left is not None and len(contents) > self._left:
            self.socket.sendall(contents[: self._left])
            raise ValueError("cut")
        if self._left is not None:
            self._left -= len(contents)
        if contents:
            sent = self.socket.sendmsg([contents], ancillary)
            if sent < len(contents):  # otherwise the peer may have closed the connection
                self.socket.sendall(contents[sent:])


def receive(connection: socket.socket, length: int) -> bytes:
    """Receive a number of bytes. Raises ValueError at the end of the stream."""
    contents = b""
    while len(contents) < length:
        part = connection.recv(length - len(contents))
        if not part:
            raise ValueError(f"the connection ended after {len(contents)} of {length} bytes")
        contents += part
    return contents


class Receiver:
    """Receiver of a migration."""

    def __init__(self, monitor: Monitor, listener: socket.socket, postcopy: bool) -> None:
        self.monitor, self.listener, self.postcopy = monitor, listener, postcopy
        self.faults: Faults | None = None
        self.files: dict[int, int] = {}
        self.vm: Vm | None = None

    def run(self) -> None:
        """Receive the VM. An error discards it."""
        main, _ = self.listener.accept()
        if not self.postcopy:
            self.listener.close()
        try:
            while self._step(main):
                pass
        except (OSError, ValueError) as error:
            self.monitor.log.append(f"Migration failed: {error}")
            self.monitor.vm = None
            with main:
                main.send(struct.pack("<H6xQ", _ERROR, 0), socket.MSG_NOSIGNAL)
            raise ValueError(str(error)) from error

    def _step(self, main: socket.socket) -> bool:
        command, length = struct.unpack("<H6xQ", receive(main, 16))
        behaviour = self.monitor.behaviour
        if command == behaviour.end_after:
            raise ValueError("ended")
        if command == behaviour.refuse:
            raise ValueError(f"command {command} failed")
        match command:
            case 1:
                assert length == 0
            case 7:
                assert length == 4
                number, files, _, _ = socket.recv_fds(main, 4, 4)
                assert len(files) == 1
                self.files[struct.unpack("<I", number)[0]] = files[0]
            case 2:
                self._configure(receive(main, length))
            case 3:
                self._restore(receive(main, length))
            case 6:
                raise ValueError("abandoned")
            case 5 | 8:
                assert self.vm is not None
                if command == 5:
                    self.vm.resume()
                self.monitor.vm = self.vm
            case _:
                raise ValueError(f"unexpected command {command}")
        main.sendall(struct.pack("<H6xQ", _OK, 0))
        return command not in (5, 8)

    def _configure(self, payload: bytes) -> None:
        mappings = json.loads(payload)["memory_manager_data"]["guest_ram_mappings"]
        slots = [
            Slot(one["slot"], one["gpa"], one["size"], one["file_offset"], self.files[one["slot"]]) for one in mappings
        ]
        self.vm = Vm(slots, (payload, b""))
        self.vm.pause()

    def _restore(self, payload: bytes) -> None:
        assert self.vm is not None
        if self.postcopy:
            faults, _ = self.listener.accept()
            self.listener.close()
            assert receive(faults, 2) == b"\2\0"
            self.faults = Faults(self.monitor, self.vm, faults)
            self.faults.start()
        self.vm.state = payload
        time.sleep(0.05)  # devices are restored, while pages are requested


class Faults:
    """Handler of the page faults of the guest: registers its memory, and requests the pages."""

    def __init__(self, monitor: Monitor, vm: Vm, connection: socket.socket) -> None:
        self.monitor, self.vm, self.connection = monitor, vm, connection
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        self.userfault = _libc.syscall(_SYS_USERFAULTFD, flags)
        if self.userfault < 0:  # no root: only for faults in user mode, which suffice here
            self.userfault = _libc.syscall(_SYS_USERFAULTFD, flags | _USER_MODE_ONLY)
        if self.userfault < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self.userfault, _UFFDIO_API, struct.pack("QQQ", 0xAA, _MINOR_SHMEM, 0))
        for slot in vm.slots:
            mode = _MODE_MISSING | (_MODE_MINOR if monitor.behaviour.minor else 0)
            register = struct.pack("QQQQ", slot.address, slot.size, mode, 0)
            fcntl.ioctl(self.userfault, _UFFDIO_REGISTER, register)

    def start(self) -> None:
        """Start the thread. If it fails, the program exits, as the faults of the guest are no longer resolved."""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._handle()
        except (OSError, ValueError) as error:
            self.monitor.log.append(f"UFFD handler exited with error: {error}")
            os.close(self.userfault)
            os._exit(3)
        self.connection.close()
        os.close(self.userfault)  # unregisters the memory

    def _handle(self) -> None:
        behaviour = self.monitor.behaviour
        if behaviour.requests or behaviour.flood:
            self._misbehave(behaviour)
            return
        served: set[tuple[int, int]] = set()
        pages = [(slot, at) for slot in self.vm.slots for at in range(0, slot.size, behaviour.request)]
        ahead = iter(pages[:1] if behaviour.no_prefault else pages)
        while len(served) < len(pages):
            if behaviour.close_after is not None and len(served) >= behaviour.close_after:
                return
            found = self._fault(0 if not behaviour.no_prefault else 50)
            if found is None:
                found = next((page for page in ahead if (page[0].number, page[1]) not in served), None)
            if found is not None:
                self._resolve(*found)
                served.add((found[0].number, found[1]))

    def _fault(self, timeout: int) -> tuple[Slot, int] | None:
        poll = select.poll()
        poll.register(self.userfault, select.POLLIN)
        if not poll.poll(timeout):
            return None
        address = struct.unpack_from("<Q", os.read(self.userfault, 32), 16)[0]
        for slot in self.vm.slots:
            if slot.address <= address < slot.address + slot.size:
                step = self.monitor.behaviour.request
                return slot, (address - slot.address) // step * step
        raise ValueError("fault outside of the memory")

    def _resolve(self, slot: Slot, at: int) -> None:
        behaviour, length = self.monitor.behaviour, self.monitor.behaviour.request
        self.connection.sendall(page_fault(slot.gpa + at, length)[:16])
        self.connection.sendall(page_fault(slot.gpa + at, length)[16:])
        self.monitor.requests.append((slot.gpa + at, length))
        if len(self.monitor.requests) == behaviour.exit_after:
            os._exit(4)
        status, extra = struct.unpack("<H6xQ", receive(self.connection, 16))
        if status != _OK or extra:
            raise ValueError(f"peer returned {status} for PageFault at gpa={slot.gpa + at:#x}")
        if not behaviour.minor:
            fcntl.ioctl(self.userfault, _UFFDIO_WAKE, struct.pack("QQ", slot.address + at, length))
            return
        try:
            fcntl.ioctl(self.userfault, _UFFDIO_CONTINUE, struct.pack("QQQq", slot.address + at, length, 0, 0))
        except FileExistsError:
            fcntl.ioctl(self.userfault, _UFFDIO_WAKE, struct.pack("QQ", slot.address + at, length))

    def _misbehave(self, behaviour: Behaviour) -> None:
        """Send messages, and then wait for the end of the connection."""
        slot = self.vm.slots[0]
        flood = page_fault(slot.gpa, PAGE) * behaviour.flood
        sender = threading.Thread(target=self.connection.sendall, args=(flood,), daemon=True)
        sender.start()
        replies = b""
        while len(replies) < 16 * behaviour.flood:
            replies += receive(self.connection, 16)
        assert replies == struct.pack("<H6xQ", _OK, 0) * behaviour.flood
        for message in behaviour.requests:
            self.connection.sendall(bytes.fromhex(message))
        if behaviour.requests:
            self.connection.shutdown(socket.SHUT_WR)
        while self.connection.recv(4096):
            pass
        raise ValueError("the peer has closed the connection")


class Handler(BaseHTTPRequestHandler):
    """Handler of the API."""

    monitor: Monitor

    def do_GET(self) -> None:
        """Reply to `vmm.ping` and `vm.info`."""
        match self.path.removeprefix("/api/v1/"):
            case "vmm.ping":
                self._reply(200, {"build_version": f"v{self.monitor.version}-fake", "version": self.monitor.version})
            case "vm.info":
                self._reply(200, self.monitor.info())
            case _:
                self._reply(404, None)

    def do_PUT(self) -> None:
        """Execute a request."""
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else {}
        try:
            match self.path.removeprefix("/api/v1/"):
                case "vm.send-migration":
                    self.monitor.send(body)
                case "vm.receive-migration":
                    signal_ignored()
                    self.monitor.receive(body)
                case "vm.pause":
                    assert self.monitor.vm is not None
                    self.monitor.vm.pause()
                case "vm.resume":
                    self.monitor.resume()
                case _:
                    self._reply(404, None)
                    return
        except ValueError as error:
            self._reply(500, [str(error)])
            return
        self._reply(204, None)

    def _reply(self, status: int, body: Any) -> None:
        contents = json.dumps(body).encode() if body is not None else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(contents)))
        self.end_headers()
        if contents:
            self.wfile.write(contents)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


class Server(ThreadingMixIn, UnixStreamServer):
    """Server of the API."""

    daemon_threads = True


def signal_ignored() -> None:
    """Ignore SIGTERM: a Cloud Hypervisor that waits for a migration does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _execute(monitor: Monitor, command: dict[str, Any]) -> dict[str, Any]:
    vm = monitor.vm
    match command.pop("what"):
        case "digest":
            assert vm is not None
            return {"digest": vm.digest(), "at_pause": vm.digest_at_pause, "paused": vm.paused, "writes": vm.writes}
        case "sweep":
            assert vm is not None
            return {"digest": vm.sweep(**command)}
        case "write":
            assert vm is not None
            vm.write(command["position"], bytes.fromhex(command["contents"]))
        case "churn":
            assert vm is not None
            threading.Thread(target=vm.churn, args=(command["seed"],), daemon=True).start()
        case "fault":  # a thread of the guest that accesses memory, whether or not it ever gets it
            assert vm is not None
            threading.Thread(target=vm.read, args=(command["position"], 1), daemon=True).start()
        case "state":
            return {
                "vm": vm is not None,
                "config": vm.config.decode() if vm else None,
                "state": vm.state.hex() if vm else None,
                "log": monitor.log,
                "requests": monitor.requests,
            }
    return {}


def settings(
    api: str,
    slots: list[tuple[int, int, int, int]] | None = None,
    *,
    contents: bytes = b"",
    version: str = "54.0.0",
    shared: bool = True,
    hugetlb: bool = False,
    behaviour: Behaviour | None = None,
) -> str:
    """Return the argument of the program. Without slots, it has no VM. `contents`: beginning of pages that are not
    zeros."""
    chosen = asdict(behaviour if behaviour is not None else Behaviour())
    return json.dumps(
        {
            "api": api,
            "slots": slots or [],
            "contents": contents.hex(),
            "version": version,
            "shared": shared,
            "hugetlb": hugetlb,
            "behaviour": chosen,
        }
    )


def main(argument: str) -> None:
    """Run the API server, and execute the commands."""
    chosen = json.loads(argument)
    Handler.monitor = monitor = Monitor(chosen)
    server = Server(chosen["api"], Handler)
    server.get_request = lambda: (server.socket.accept()[0], ("", 0))  # type: ignore[method-assign]  # names a client
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_execute(monitor, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
