"""QEMU command lines: what is understood, what is added, what is refused and how that is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import UnsupportedError, UsageError
from pageferry.workloads.qemu_command import DEFAULT_RAM, parse, parse_size

QEMU = "qemu-system-x86_64"
SHARED = "memory-backend-file,id=mem,size=1G,mem-path=/dev/hugepages/x,share=on,align=2M"
GIB = 1 << 30
MIB = 1 << 20


def ram(*options: str) -> int:
    return parse([QEMU, *options]).ram_size


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ((), DEFAULT_RAM),
        (("-m", "1G"), GIB),
        (("-m", "512"), 512 * MIB),
        (("-m", "512M"), 512 * MIB),
        (("-m", "1.5G"), 3 * GIB // 2),
        (("-m", "2t"), 2048 * GIB),
        (("-m", "size=1G"), GIB),
        (("-m", "size=1G,slots=0,maxmem=1G"), GIB),
        (("--m", "1G"), GIB),
        (("-m", "1G", "-m", "2G"), 2 * GIB),
        (("-m", "2097153k"), 2097160 << 10),
        (("-name", "-m", "-append", "-m 5G", "-m", "1G"), GIB),
        (("disk.img", "-nographic", "-S", "-m", "1G"), GIB),
    ],
)
def test_size_of_memory(options: tuple[str, ...], size: int) -> None:
    assert ram(*options) == size


@given(st.integers(1, 1 << 20), st.sampled_from("KMGT"))
def test_sizes_in_units(number: int, unit: str) -> None:
    expected = number * {"K": 1 << 10, "M": MIB, "G": GIB, "T": 1 << 40}[unit]
    assert parse_size(f"{number}{unit}", "-m") == parse_size(f"{number}{unit.lower()}", "-m") == expected


def test_what_is_added() -> None:
    words = parse([QEMU, "-m", "1G", "-machine", "q35,accel=kvm"]).managed(
        ram_path="/proc/self/fd/7", qmp_socket="/run/a,b/qmp.sock", incoming=False
    )
    assert words == [
        *(QEMU, "-m", "1G", "-machine", "q35,accel=kvm"),
        *("-object", f"memory-backend-file,id=pageferry-ram,size={GIB},share=on,align=2M,mem-path=/proc/self/fd/7"),
        *("-machine", "memory-backend=pageferry-ram"),
        *("-qmp", "unix:/run/a,,b/qmp.sock,server=on,wait=off"),
    ]


def test_destination_waits_and_stays_paused() -> None:
    words = parse([QEMU]).managed(ram_path="/x", qmp_socket="/qmp", incoming=True)
    assert words[-3:] == ["-incoming", "defer", "-S"]


@pytest.mark.parametrize(
    "options",
    [
        ("-object", SHARED, "-machine", "memory-backend=mem"),
        ("-object", SHARED, "-machine", "q35,memory-backend=mem"),
        ("-object", SHARED, "-M", "pc,memory-backend=mem"),
        ("-object", SHARED, "-numa", "node,memdev=mem"),
        ("-object", SHARED.replace("align=2M", "align=2097152"), "-machine", "memory-backend=mem"),
        (
            "-object",
            '{"qom-type":"memory-backend-file","id":"mem","size":1073741824,"mem-path":"/x","share":true,"align":2097152}',
            *("-machine", "memory-backend=mem"),
        ),
    ],
)
def test_shared_memory_of_the_users_own_is_taken_as_it_is(options: tuple[str, ...]) -> None:
    command = parse([QEMU, "-m", "1G", *options])
    assert not command.needs_ram_file
    assert command.warnings == ()
    words = command.managed(ram_path=None, qmp_socket="/qmp", incoming=False)
    assert words[:-2] == [QEMU, "-m", "1G", *options]


@pytest.mark.parametrize("align", ["", ",align=4k", ",align=0", ",align=3M"])
def test_memory_of_the_users_own_that_is_not_aligned_warns(align: str) -> None:
    backend = SHARED.replace(",align=2M", align)
    (warning,) = parse([QEMU, "-object", backend, "-machine", "memory-backend=mem"]).warnings
    assert "large pages are off for mem" in warning
    assert "align=2M" in warning


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("-incoming", "defer"), "-incoming .*pageferry receive"),
        (("--incoming", "tcp:0:4444"), "-incoming"),
        (("-daemonize",), "-daemonize .* --detach"),
        (("-preconfig",), "-preconfig"),
        (("-mem-path", "/dev/hugepages"), "-mem-path .*--hugetlb"),
        (("-m", "1G,slots=2,maxmem=4G"), "slots and maxmem"),
        (("-m", "1G,maxmem=4G"), "slots and maxmem"),
        (("-machine", "pc,memory.size=1G"), "memory.size"),
        (("-device", "pc-dimm,memdev=x"), "pc-dimm"),
        (("-device", "virtio-mem-pci,memdev=x"), "virtio-mem-pci"),
        (("-device", '{"driver":"vfio-pci","host":"0000:01:00.0"}'), "vfio-pci .* host"),
        (("-device", "vhost-user-fs-pci,chardev=c"), "vhost-user-fs-pci .* another process"),
        (("-netdev", "vhost-user,id=n,chardev=c"), "vhost-user"),
        (
            ("-object", "memory-backend-ram,id=mem,size=1G", "-machine", "memory-backend=mem"),
            "memory-backend-ram,id=mem",
        ),
        (
            ("-object", "memory-backend-memfd,id=mem,share=on", "-M", "memory-backend=mem"),
            "memory-backend-memfd,id=mem",
        ),
        (("-object", SHARED.replace("share=on,", ""), "-machine", "memory-backend=mem"), "id=mem is private"),
        (("-object", SHARED + ",readonly=on", "-machine", "memory-backend=mem"), "read-only"),
        (("-object", "memory-backend-ram,id=n0,size=1G", "-numa", "node,memdev=n0"), "memory-backend-ram,id=n0"),
        (("-object", SHARED), "id=mem is memory that pageferry would not manage"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: tuple[str, ...], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        parse([QEMU, *options])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("-m",), "-m comes last"),
        (("-m", "lots"), "'lots' is no size"),
        (("-m", "-1G"), "is no size"),
        (("-m", "0"), "no memory at all"),
        (("-machine", "memory-backend=mem"), "backend mem, and there is no -object"),
        (("-device", "{"), "is no JSON"),
    ],
)
def test_what_makes_no_sense_is_refused(options: tuple[str, ...], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse([QEMU, *options])


def test_nothing_to_run() -> None:
    with pytest.raises(UsageError, match="after --"):
        parse([])


@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=12), max_size=8))
def test_whatever_is_given_is_passed_on_or_refused(words: list[str]) -> None:
    try:
        command = parse([QEMU, *words])
    except (UsageError, UnsupportedError):
        return
    managed = command.managed(ram_path="/x", qmp_socket="/qmp", incoming=False)
    assert managed[: len(words) + 1] == [QEMU, *words]
