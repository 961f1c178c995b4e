"""Syntax of QEMU's command line: separates options from values, and parses the properties in a value.

Whether a value follows depends on the option, and newer versions have more options. The options of QEMU 7.2 to 11.1 are
known. For any other option, the QEMU binary is queried (`-help`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pageferry.errors import UsageError
from pageferry.host import qemus

_FLAGS = frozenset(
    """S alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-kvm enable-sync-profile
    full-screen h help jitdump mem-prealloc no-acpi no-fd-bootchk no-hpet no-quit no-reboot no-shutdown no-user-config
    nodefaults nographic old-param one-insn-per-tb only-migratable perfmap portrait preconfig s sdl semihosting
    singlestep snapshot usb version win2k-hack xen-attach xen-domid-restrict""".split()
)
"""Options without a value."""

_WITH_VALUE = frozenset(
    """D L M accel acpitable action add-fd append audio audiodev bios blockdev boot cdrom chardev chroot compat cpu d
    debugcon device dfilter display drive dtb dump-vmstate echr fda fdb fsdev fw_cfg g gdb global hda hdb hdc hdd icount
    incoming initrd iscsi k kernel loadvm m machine mem-path mon monitor msg mtdblock name net netdev nic numa object
    option-rom overcommit parallel pflash pidfile plugin prom-env qmp qmp-pretty qtest qtest-log readconfig rotate rtc
    run-with runas sandbox sd seed semihosting-config serial set shim smbios smp spice tpmdev trace usbdevice uuid vga
    virtfs vnc watchdog-action xen-domid""".split()
)

ON = frozenset(("on", "yes", "true", "y"))
"""Values of a property that is switched on."""
DISK_OPTIONS = frozenset("hda hdb hdc hdd cdrom fda fdb mtdblock pflash sd".split())
"""Options whose value is the file of a disk."""

_PART = re.compile(r"(?:[^,]|,,)+")
"""Property, in which `,,` stands for a comma."""


def options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each option, without hyphens, and its value. An argument that is a disk image yields `drive`.

    `arguments`: the program first. Raises UsageError if neither pageferry nor the program knows an option, or if a
    value is missing.
    """
    for name, value, _ in option_values(arguments):
        yield name, value


def option_values(arguments: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Yield the options as `options` does, each with the index of the argument that contains its value, or of the
    option itself if it has no value."""
    words = iter(enumerate(arguments))
    next(words, None)
    for index, word in words:
        if not word.startswith("-") or word == "-":
            yield "drive", f"file={word.replace(',', ',,')}", index
            continue
        name = word.removeprefix("-").removeprefix("-")
        if not _takes_value(arguments[0], name):
            yield name, "", index
            continue
        at, value = next(words, (index, None))
        if value is None:
            raise UsageError(f"invalid QEMU option {word}: expected a value")
        yield name, value, at


def properties(value: str, implied: str) -> dict[str, str]:
    """Return the properties of an option value, which is `first,key=value,flag` or JSON. `implied`: key of `first`.

    Nested JSON properties have the names that QEMU uses elsewhere: `file.driver`, `host-nodes.0`. Raises UsageError.
    """
    return dict(property_list(value, implied))


def property_list(value: str, implied: str) -> Iterator[tuple[str, str]]:
    """Yield the properties of an option value as `properties` does, including repeated ones. Raises UsageError."""
    if value.startswith("{"):
        yield from flat("", _decoded(value))
        return
    for part in _PART.finditer(value):
        key, equals, text = part[0].replace(",,", ",").partition("=")
        if equals:
            yield key, text
        elif part.start() == 0:
            yield implied, key
        else:
            yield key, "on"


def with_property(value: str, key: str, text: str) -> str:
    """Return an option value in which the property `key` has the value `text`. Raises UsageError."""
    if value.startswith("{"):
        return json.dumps(_decoded(value) | {key: text})
    parts = [part[0] for part in _PART.finditer(value) if part[0].partition("=")[0] != key]
    return ",".join([*parts, f"{key}={text.replace(',', ',,')}"])


def block_properties(value: str, implied: str) -> Iterator[tuple[str, str]]:
    """Yield the properties of a disk, including those in file names that are JSON (`json:{...}`). Raises UsageError."""
    for key, text in properties(value, implied).items():
        yield key, text
        if text.startswith("json:"):
            yield from flat(key, _decoded(text.removeprefix("json:")))


def _takes_value(program: str, option: str) -> bool:
    if option in _FLAGS or option in _WITH_VALUE:
        return option in _WITH_VALUE
    takes = qemus.option_takes_value(program, option)
    if takes is None:
        raise UsageError(
            f"cannot determine whether QEMU option -{option} has a value: {program} -help does not list it; check "
            "the name"
        )
    return takes


def _decoded(text: str) -> dict[str, Any]:
    try:
        decoded = json.loads(text)
    except (ValueError, RecursionError) as wrong:
        raise UsageError(f"invalid option value {text[:80]!r}: expected JSON ({wrong})") from wrong
    if not isinstance(decoded, dict):
        raise UsageError(f"invalid option value {text[:80]!r}: expected a JSON object")
    return decoded


def flat(key: str, item: Any) -> Iterator[tuple[str, str]]:
    """Yield the properties of nested JSON under the name `key`, with the names that QEMU uses elsewhere."""
    match item:
        case dict():
            for name, inner in item.items():
                yield from flat(f"{key}.{name}" if key else name, inner)
        case list():
            for number, inner in enumerate(item):
                yield from flat(f"{key}.{number}", inner)
        case bool():
            yield key, "on" if item else "off"
        case None:
            yield key, ""
        case _:
            yield key, str(item)
