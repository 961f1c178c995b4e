"""QEMU command lines: checks the command line of the user, and derives the command line that pageferry starts.

Guest memory must be a shared file that pageferry can map too, and the huge pages of the file must be aligned with those
of the guest. The user's ``qemu-system-x86_64 -m 4G ...`` therefore becomes::

    qemu-system-x86_64 -m 4G ...
        -object memory-backend-file,id=pageferry-ram,size=S,share=on,align=2M,mem-path=/proc/self/fd/N
        -machine memory-backend=pageferry-ram
        -qmp unix:RUN/NAME/qmp.sock,server=on,wait=off

A detached guest whose command line does not use the first serial port also gets a socket for this port, for `pageferry
console`::

        -chardev socket,id=pageferry-console,path=RUN/NAME/tty.sock,server=on,wait=off
        -serial chardev:pageferry-console

QEMU merges repeated `-machine` options. A memory backend of the user is used unchanged if it is a shared file.
Configurations that cannot be managed (private memory, memory that is written to without a trace, hotplug, `-incoming`)
are refused with an error that names the option.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from pageferry.errors import UnsupportedError, UsageError
from pageferry.memory.regions import LARGE_PAGE
from pageferry.workloads.qemu import unsupported
from pageferry.workloads.qemu.option_syntax import DISK_OPTIONS, ON, block_properties, options, properties

BACKEND = "pageferry-ram"
"""Id of the memory backend that pageferry adds. The region and QEMU's ramblock have the same name."""

CONSOLE = "pageferry-console"
"""Id of the character device that pageferry adds for the first serial port."""

DEFAULT_RAM = 128 << 20
"""QEMU's default memory size for PC machines, bytes."""

_REFUSED_OPTIONS = {
    "incoming": "the guest would wait for a migration by another program; use `pageferry receive` instead",
    "daemonize": "use `pageferry run --detach`, which writes the output of the guest to a log",
    "preconfig": "the machine would not be created yet when pageferry inspects it; remove the option",
    "readconfig": "pageferry does not read this file; give the options in it on the command line",
    "mem-path": "pageferry creates the memory file; remove the option (--hugetlb uses 2 MiB pages of hugetlbfs)",
}

_USE_SHARED_FILE = (
    "remove this backend, or use `-object memory-backend-file,id=ID,size=SIZE,mem-path=FILE,share=on,align=2M`"
)

_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([BKMGT]?)", re.IGNORECASE)


_NO_CONSOLE = frozenset(("serial", "nographic", "nodefaults", "curses"))
"""Options with which the first serial port is used by the user, or does not exist."""


class RamFile(NamedTuple):
    """Range of a file with guest memory."""

    path: str
    offset: int
    """Offset in the file, bytes."""
    size: int
    """Size, bytes."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """Parsed QEMU command line of a user. It has passed the checks for management."""

    arguments: tuple[str, ...]
    """Arguments as given, the program first."""
    ram_size: int
    """Size of guest memory, bytes."""
    needs_ram_file: bool
    """Whether pageferry must add a memory file. False if the command line of the user already backs guest memory by a
    shared file."""
    warnings: tuple[str, ...]
    ram_files: tuple[RamFile, ...] = ()
    """Files or directories that the command line of the user gives for guest memory."""

    @property
    def preallocates(self) -> bool:
        """Whether QEMU allocates all of guest memory when it starts (`-mem-prealloc`, or `prealloc=on`)."""
        return any(
            name == "mem-prealloc" or (name == "object" and properties(value, "qom-type").get("prealloc") in ON)
            for name, value in options(self.arguments)
        )

    @property
    def has_free_serial(self) -> bool:
        """Whether QEMU creates its default serial port, and would connect it only to a window of its display.

        Connecting another character device does not change the machine. With -nodefaults, or with a device of the
        user, there is no default serial port; adding one would change the machine.
        """
        return not any(
            name in _NO_CONSOLE or (name == "device" and "serial" in properties(value, "driver").get("driver", ""))
            for name, value in options(self.arguments)
        )

    def managed(
        self, *, ram_path: str | None, qmp_socket: str, incoming: bool, console: str | None = None
    ) -> list[str]:
        """Return the command line to start: with guest memory in the file at `ram_path`, and a monitor on `qmp_socket`.
        `incoming`: QEMU waits, paused, for a device state. `console`: path of a socket for the first serial port; None
        to leave the port unchanged.
        """
        result = list(self.arguments)
        if self.needs_ram_file:
            assert ram_path is not None
            backend = f"memory-backend-file,id={BACKEND},size={self.ram_size},share=on,align=2M,mem-path={ram_path}"
            result += ["-object", backend, "-machine", f"memory-backend={BACKEND}"]
        result += ["-qmp", f"unix:{_escaped(qmp_socket)},server=on,wait=off"]
        if console is not None:
            # No log is written, because a guest could make it arbitrarily long.
            device = f"socket,id={CONSOLE},path={_escaped(console)},server=on,wait=off"
            result += ["-chardev", device, "-serial", f"chardev:{CONSOLE}"]
        if incoming:
            result += ["-incoming", "defer", "-S"]
        return result


def _escaped(path: str) -> str:
    return path.replace(",", ",,")


def given_by_user(words: Sequence[str]) -> list[str] | None:
    """Return the command line of a user from the command line that `CommandLine.managed` has made of it; None if
    `words` has another form, because another program has started the guest or has changed the command line."""
    left = list(words)
    if left[-3:] == ["-incoming", "defer", "-S"]:
        del left[-3:]
    if left[-2:] == ["-serial", f"chardev:{CONSOLE}"] and left[-4:-3] == ["-chardev"]:
        del left[-4:]
    if left[-2:-1] != ["-qmp"]:
        return None
    del left[-2:]
    if left[-2:] == ["-machine", f"memory-backend={BACKEND}"] and left[-4:-3] == ["-object"]:
        del left[-4:]
    return left


def parse(arguments: Sequence[str]) -> CommandLine:
    """Parse a QEMU command line, program first.

    Raises UsageError if the command line is invalid, UnsupportedError if the guest cannot be managed.
    """
    if not arguments:
        raise UsageError(
            "cannot start a guest: the command line of QEMU is missing; give it after --, as in `pageferry run web -- "
            "qemu-system-x86_64 -m 4G ...`"
        )
    given = list(options(arguments))
    for name, value in given:
        _refuse(name, value)
    memory = _merged(given, "m", "size")
    machine = _merged(given, "machine", "type") | _merged(given, "M", "type")
    size = _memory_size(memory, machine)
    backends = _used_backends(given, machine)
    return CommandLine(
        arguments=tuple(arguments),
        ram_size=size,
        needs_ram_file=not backends,
        warnings=tuple(_backend_warnings(backends)),
        ram_files=tuple(map(_ram_file, backends)),
    )


def parse_size(text: str, what: str, *, bare: str = "M") -> int:
    """Return a size in QEMU's notation (a number with B, K, M, G or T) as a number of bytes. `what`: option, for error
    messages. `bare`: unit of a number without a unit. Raises UsageError."""
    matched = _SIZE.fullmatch(text)
    if matched is None:
        raise UsageError(f"invalid size {text!r} of {what}: expected a size such as 512M or 4G")
    number, unit = matched.groups()
    return int(Decimal(number) * _UNITS[unit.upper() or bare])


def _merged(given: Sequence[tuple[str, str]], option: str, implied: str) -> dict[str, str]:
    """Return the properties of all uses of an option, merged as in QEMU: later values override earlier ones."""
    result: dict[str, str] = {}
    for name, value in given:
        if name == option:
            result |= properties(value, implied)
    return result


def _refuse(name: str, value: str) -> None:
    """Raise UnsupportedError if a guest with this option cannot be managed."""
    if name in _REFUSED_OPTIONS:
        raise UnsupportedError(f"unsupported option -{name}: {_REFUSED_OPTIONS[name]}")
    match name:
        case "device":
            unsupported.refuse_device(properties(value, "driver").get("driver", ""))
        case "netdev" | "nic" | "net":
            unsupported.refuse_network(properties(value, "type"))
        case "object":
            unsupported.refuse_object(properties(value, "qom-type").get("qom-type", ""))
        case "blockdev" | "drive":
            unsupported.refuse_block(block_properties(value, "driver" if name == "blockdev" else "file"))
        case _ if name in DISK_OPTIONS:
            unsupported.refuse_block([("file", value)])


def _memory_size(memory: Mapping[str, str], machine: Mapping[str, str]) -> int:
    for key in machine:
        if key in ("confidential-guest-support", "memory-encryption"):
            raise UnsupportedError(f"unsupported option -machine {key}: {unsupported.CONFIDENTIAL}")
        if key.startswith("memory."):
            raise UnsupportedError(f"unsupported option -machine {key}: give the size with -m")
    size = parse_size(memory["size"], "-m") if "size" in memory else DEFAULT_RAM
    size = -(-size // 8192) * 8192  # QEMU rounds the size in the same way
    if size == 0:
        raise UsageError("invalid option -m 0: expected a size above 0")
    return size


def _used_backends(given: Sequence[tuple[str, str]], machine: Mapping[str, str]) -> list[dict[str, str]]:
    """Check and return the user's memory backends that are guest memory; an empty list if the command line selects
    none. Raises UsageError, UnsupportedError."""
    objects = [properties(value, "qom-type") for name, value in given if name == "object"]
    backends = {
        one["id"]: one for one in objects if one.get("qom-type", "").startswith("memory-backend-") and "id" in one
    }
    nodes = [properties(value, "type") for name, value in given if name == "numa"]
    used = [machine["memory-backend"]] if "memory-backend" in machine else []
    used += [node["memdev"] for node in nodes if "memdev" in node]
    for name in used:
        if name not in backends:
            raise UsageError(
                f"invalid option memory-backend={name}: no -object has this id; add one, or correct the id"
            )
        _check_backend(backends[name])
    for name, backend in backends.items():
        if name not in used:
            raise UnsupportedError(
                f"unsupported option -object {backend['qom-type']},id={name}: pageferry would not manage this "
                "memory; remove it"
            )
    return [backends[name] for name in used]


def _check_backend(backend: Mapping[str, str]) -> None:
    kind, name = backend["qom-type"], backend["id"]
    if kind != "memory-backend-file":
        raise UnsupportedError(
            f"unsupported guest memory in {kind},id={name}: it is not in a named file; {_USE_SHARED_FILE}"
        )
    if backend.get("share") not in ON:
        raise UnsupportedError(
            f"unsupported guest memory in {kind},id={name}: it is private (no share=on); {_USE_SHARED_FILE}"
        )
    if backend.get("readonly", "off") in ON:
        raise UnsupportedError(f"unsupported guest memory in {kind},id={name}: it is read-only; remove readonly")


def _ram_file(backend: Mapping[str, str]) -> RamFile:
    offset = parse_size(backend.get("offset", "0"), "offset", bare="B")
    return RamFile(backend.get("mem-path", ""), offset, parse_size(backend.get("size", "0"), "size", bare="B"))


def _backend_warnings(backends: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for backend in backends:
        align = parse_size(backend.get("align", "0"), "align", bare="B")
        if align == 0 or align % LARGE_PAGE:
            name = backend["id"]
            yield f"{name}: huge pages are disabled unless its file is on hugetlbfs; add align=2M to its -object"
