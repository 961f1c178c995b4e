"""Tests of QEMU command lines: parsing, added options, and error messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import UnsupportedError, UsageError
from pageferry.host import qemus
from pageferry.workloads.qemu import option_syntax
from pageferry.workloads.qemu.command_line import DEFAULT_RAM, parse, parse_size

QEMU = "qemu-system-x86_64"
SHARED = "memory-backend-file,id=mem,size=1G,mem-path=/dev/hugepages/x,share=on,align=2M"
LIBVIRT_BACKEND = (
    '{"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"/dev/shm/x","share":true,"prealloc":false,'
    '"x-use-canonical-path-for-ramblock-id":false,"size":1073741824,"align":2097152,"host-nodes":[0,1],'
    '"policy":"bind"}'
)
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
        (("-m", "1G,slots=2,maxmem=4G"), GIB),
        (("--m", "1G"), GIB),
        (("-m", "1G", "-m", "2G"), 2 * GIB),
        (("-m", "2097153k"), 2097160 << 10),
        (("-name", "-m", "-append", "-m 5G", "-m", "1G"), GIB),
        (("-perfmap", "-m", "4G"), 4 * GIB),
        (("-jitdump", "-async-teardown", "-m", "4G"), 4 * GIB),
        (("-shim", "-m", "-m", "4G"), 4 * GIB),
        (("disk.img", "-nographic", "-S", "-m", "1G"), GIB),
    ],
)
def test_memory_size_is_parsed(options: tuple[str, ...], size: int) -> None:
    assert ram(*options) == size


@given(st.integers(1, 1 << 20), st.sampled_from("KMGT"))
def test_size_units_are_parsed(number: int, unit: str) -> None:
    expected = number * {"K": 1 << 10, "M": MIB, "G": GIB, "T": 1 << 40}[unit]
    assert parse_size(f"{number}{unit}", "-m") == parse_size(f"{number}{unit.lower()}", "-m") == expected


def test_managed_options_are_added() -> None:
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
        (
            "-object",
            LIBVIRT_BACKEND,
            *("-machine", "memory-backend=pc.ram"),
            *("-device", '{"driver":"virtio-blk-pci","num-queues":1,"bus":"pci.0","drive":"d","write-cache":"on"}'),
            *("-blockdev", '{"driver":"qcow2","node-name":"d","file":{"driver":"file","filename":"x"},"backing":null}'),
            *("-netdev", '{"type":"user","id":"n","hostfwd":[{"str":"tcp::1-:2"}],"ipv6":false,"net":1.5}'),
        ),
    ],
)
def test_shared_memory_of_the_user_is_used_unchanged(options: tuple[str, ...]) -> None:
    command = parse([QEMU, "-m", "1G", *options])
    assert not command.needs_ram_file
    assert command.warnings == ()
    words = command.managed(ram_path=None, qmp_socket="/qmp", incoming=False)
    assert words[:-2] == [QEMU, "-m", "1G", *options]


@pytest.mark.parametrize("align", ["", ",align=4k", ",align=0", ",align=3M"])
def test_unaligned_memory_of_the_user_causes_a_warning(align: str) -> None:
    backend = SHARED.replace(",align=2M", align)
    (warning,) = parse([QEMU, "-object", backend, "-machine", "memory-backend=mem"]).warnings
    assert "mem: huge pages are disabled" in warning
    assert "align=2M" in warning


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("-incoming", "defer"), "-incoming.*pageferry receive"),
        (("--incoming", "tcp:0:4444"), "-incoming"),
        (("-daemonize",), "-daemonize.*--detach"),
        (("-preconfig",), "-preconfig"),
        (("-mem-path", "/dev/hugepages"), "-mem-path.*--hugetlb"),
        (("-machine", "pc,memory.size=1G"), "memory.size"),
        (("-device", "pc-dimm,memdev=x"), "pc-dimm"),
        (("-device", "virtio-mem-pci,memdev=x"), "virtio-mem-pci"),
        (("-device", '{"driver":"vfio-pci","host":"0000:01:00.0"}'), "vfio-pci.*host"),
        (("-device", "vhost-user-fs-pci,chardev=c"), "vhost-user-fs-pci.*another process"),
        (("-netdev", "vhost-user,id=n,chardev=c"), "vhost-user"),
        (("-netdev", '{"type":"vhost-user","id":"n","chardev":"c"}'), "network vhost-user.*another process"),
        (("-netdev", "vhost-vdpa,vhostdev=/dev/vhost-vdpa-0,id=n"), "network vhost-vdpa.*device of the host"),
        (("-nic", "vhost-vdpa,vhostdev=/dev/vhost-vdpa-0"), "network vhost-vdpa"),
        (("-netdev", "passt,id=n,vhost-user=on"), "network passt,vhost-user=on.*another process"),
        (("-device", "vhost-vdpa-device-pci,vhostdev=/dev/vhost-vdpa-0"), "vhost-vdpa-device-pci"),
        (("-device", "vfio-user-pci,socket.path=/x"), "vfio-user-pci"),
        (("-device", "vhost-scsi-pci,wwpn=naa.1"), "vhost-scsi-pci.*pinned pages"),
        (("-device", "x-pci-proxy-dev,fd=3"), "x-pci-proxy-dev"),
        (("-device", "pvrdma"), "pvrdma"),
        (("-device", "ivshmem-plain,memdev=x"), "ivshmem-plain"),
        (("-object", "cryptodev-vhost-user,id=c,chardev=d"), "cryptodev-vhost-user"),
        (("-object", '{"qom-type":"sev-snp-guest","id":"s"}'), "sev-snp-guest.*confidential"),
        (("-machine", "q35,confidential-guest-support=s"), "confidential-guest-support"),
        (("-blockdev", "nvme,device=0000:01:00.0,namespace=1,node-name=d"), "driver nvme.*device of the host"),
        (("-blockdev", '{"driver":"nvme","device":"0000:01:00.0","namespace":1}'), "block driver nvme"),
        (("-blockdev", '{"driver":"qcow2","file":{"driver":"virtio-blk-vhost-vdpa","path":"/x"}}'), "vhost-vdpa"),
        (("-blockdev", "driver=raw,file.driver=nvme-io_uring,file.path=/dev/ng0n1"), "nvme-io_uring"),
        (("-drive", "file=nvme://0000:01:00.0/1,if=none"), "block driver nvme"),
        (("-drive", "file.driver=nvme,file.device=0000:01:00.0"), "block driver nvme"),
        (("-drive", 'file=json:{"driver":"raw",,"file":{"driver":"virtio-blk-vfio-pci"}}'), "virtio-blk-vfio-pci"),
        (("-cdrom", "nvme://0000:01:00.0/1"), "block driver nvme"),
        (("nvme://0000:01:00.0/1",), "block driver nvme"),
        (("-readconfig", "guest.cfg"), "option -readconfig: pageferry does not read this file"),
        (
            ("-object", "memory-backend-ram,id=mem,size=1G", "-machine", "memory-backend=mem"),
            "memory-backend-ram,id=mem",
        ),
        (
            ("-object", "memory-backend-memfd,id=mem,share=on", "-M", "memory-backend=mem"),
            "memory-backend-memfd,id=mem",
        ),
        (("-object", SHARED.replace("share=on,", ""), "-machine", "memory-backend=mem"), "id=mem: it is private"),
        (("-object", SHARED + ",readonly=on", "-machine", "memory-backend=mem"), "read-only"),
        (("-object", "memory-backend-ram,id=n0,size=1G", "-numa", "node,memdev=n0"), "memory-backend-ram,id=n0"),
        (("-object", SHARED), "id=mem: pageferry would not manage this memory"),
    ],
)
def test_unsupported_options_are_refused_by_name(options: tuple[str, ...], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        parse([QEMU, *options])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("-m",), "option -m: expected a value"),
        (("-m", "lots"), "invalid size 'lots'"),
        (("-m", "-1G"), "invalid size"),
        (("-m", "0"), "expected a size above 0"),
        (("-machine", "memory-backend=mem"), "backend=mem: no -object has this id"),
        (("-device", "{"), "expected JSON"),
        (("-device", "{" * 100000), "expected JSON"),
        (("-device", '{"driver":' * 100000), "expected JSON"),
        (("-device", '{"size":' + "1" * 10000 + "}"), "expected JSON"),
        (("-perfmap-of-tomorrow", "-m", "4G"), "-perfmap-of-tomorrow has a value: .* -help does not list it"),
    ],
)
def test_invalid_options_are_refused(options: tuple[str, ...], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse([QEMU, *options])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('{"driver":"e1000","bus":1,"rom":true,"x":false}', {"driver": "e1000", "bus": "1", "rom": "on", "x": "off"}),
        ('{"a":{"b":[1,{"c":null}]}}', {"a.b.0": "1", "a.b.1.c": ""}),
        ('{"size":18446744073709551615,"part":1.5}', {"size": "18446744073709551615", "part": "1.5"}),
        ("first,k=v,flag", {"type": "first", "k": "v", "flag": "on"}),
        ("k=a,,b,,,l=c", {"k": "a,b,", "l": "c"}),
        ("k=,,,l", {"k": ",", "l": "on"}),
    ],
)
def test_option_properties_are_parsed(value: str, expected: dict[str, str]) -> None:
    assert option_syntax.properties(value, "type") == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.sampled_from(["device", "object", "netdev", "blockdev"]), st.dictionaries(st.text(max_size=5), JSON))
def test_any_json_is_parsed(option: str, value: dict[str, object]) -> None:
    parse([QEMU, f"-{option}", json.dumps(value), "-m", "1G"])


@pytest.mark.parametrize("name", ["qemu_system", "qemu_10", "qemu_11"])
def test_option_table_matches_help_of_this_qemu(request: pytest.FixtureRequest, name: str) -> None:
    qemu: Path = request.getfixturevalue(name)
    listed = {name: takes for name, takes in qemus._options_of(str(qemu)).items() if name != "M"}  # `-M` is `-machine`
    assert len(listed) > 80
    table = dict.fromkeys(option_syntax._FLAGS, False) | dict.fromkeys(option_syntax._WITH_VALUE, True)
    assert {name: takes for name, takes in listed.items() if table.get(name) is not takes} == {}


def test_unknown_option_is_looked_up_in_help(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text(
        "#!/bin/sh\necho '-new-flag       described'\necho '-new-long-option-name  described'\n"
        "echo '-new-value file do'\necho '-new-long-value-name file'\necho '-bare'\n"
    )
    program.chmod(0o755)
    options = ["-new-flag", "-new-long-option-name", "-bare", "-new-value", "-m", "-new-long-value-name", "-m"]
    assert parse([str(program), *options, "-m", "4G"]).ram_size == 4 * GIB


def test_empty_command_is_refused() -> None:
    with pytest.raises(UsageError, match="after --"):
        parse([])


@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=12), max_size=8))
def test_any_words_are_passed_on_or_refused(words: list[str]) -> None:
    try:
        command = parse([QEMU, *words])
    except (UsageError, UnsupportedError):
        return
    managed = command.managed(ram_path="/x", qmp_socket="/qmp", incoming=False)
    assert managed[: len(words) + 1] == [QEMU, *words]


@pytest.mark.parametrize(
    ("options", "preallocates"),
    [
        ((), False),
        (("-mem-prealloc",), True),
        (("-object", f"{SHARED},prealloc=on", "-machine", "memory-backend=mem"), True),
    ],
)
def test_preallocated_memory_is_recognised(options: tuple[str, ...], preallocates: bool) -> None:
    assert parse([QEMU, *options]).preallocates is preallocates
