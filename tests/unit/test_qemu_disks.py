"""Tests of the record of a guest's disks: replies of QEMU, encoding, and comparison between hosts."""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from typing import Any

import msgspec
import pytest

from pageferry.errors import DisksDiffer, WorkloadError
from pageferry.migration.transport.messages import MAX_DETAIL
from pageferry.workloads.qemu import block_devices, disk_choice
from pageferry.workloads.qemu.block_devices import BlockDevice, DiskRecord, File, Generation, Host, Layer
from pageferry.workloads.qemu.disk_comparison import (
    Sameness,
    check_migration,
    check_restore,
    sameness,
    unsaved,
    without_overlays,
)
from pageferry.workloads.qemu.storage import Storage

MIB = 1 << 20
HERE, THERE = Host(boot="b1", machine="m1"), Host(boot="b2", machine="m2")
RESTARTED = Host(boot="b3", machine="m1")


# -- replies of QEMU ---------------------------------------------------------------------------------------------------


def image(filename: str, kind: str = "raw", size: int = MIB, below: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return an image as in the reply to `query-block`."""
    found: dict[str, Any] = {"filename": filename, "format": kind, "virtual-size": size, "actual-size": 0}
    return found if below is None else found | {"backing-image": below}


def block(qdev: str | None, device: str = "", top: dict[str, Any] | None = None, **inserted: Any) -> dict[str, Any]:
    """Return a device as in the reply to `query-block`; without a medium if `top` is None."""
    found: dict[str, Any] = {"device": device, "locked": False, "removable": top is None, "type": "unknown"}
    if qdev is not None:
        found["qdev"] = qdev
    if top is not None:
        cache = {"writeback": True, "direct": False, "no-flush": False}
        found["inserted"] = {"image": top, "node-name": "#block1", "ro": False, "drv": "raw", "cache": cache} | inserted
    return found


def parsed(*blocks: dict[str, Any]) -> BlockDevice:
    (device,) = block_devices.parse(blocks)
    return device


def test_disk_is_parsed() -> None:
    cache = {"writeback": False, "direct": True, "no-flush": False}
    reply = block("/machine/peripheral-anon/device[0]/virtio-backend", "disk", image("/d"), ro=True, cache=cache)
    assert parsed(reply) == BlockDevice(
        id="peripheral-anon/device[0]",
        name="disk",
        node="#block1",
        read_only=True,
        cache="direct",
        layers=(Layer(format="raw", path="/d", size=MIB),),
    )


@pytest.mark.parametrize(
    ("qdev", "drive", "name"),
    [
        ("/machine/peripheral/d0/virtio-backend", "", "d0"),
        ("sd1", "", "sd1"),
        ("/machine/system.flash1", "pflash1", "system.flash1"),
        ("/machine/unattached/device[18]", "ide1-cd0", "ide1-cd0"),
    ],
)
def test_ids_do_not_depend_on_the_version_of_qemu(qdev: str, drive: str, name: str) -> None:
    assert parsed(block(qdev, drive)).id == name


def test_drive_without_a_medium_has_no_layers() -> None:
    assert parsed(block("/machine/peripheral/cd", "cd")).layers == ()


def test_drive_without_a_device_is_left_out() -> None:
    assert block_devices.parse([block(None, "sd0"), block(None, "spare", image("/d"))]) == ()


def test_backing_chain_is_parsed_without_filters() -> None:
    base = image("/base", "raw")
    chain = image("json:{}", "throttle", below=image("/top", "qcow2", below=image("/middle", "qcow2", below=base)))
    layers = parsed(block("d", top=chain)).layers
    assert [(layer.path, layer.format) for layer in layers] == [
        ("/top", "qcow2"),
        ("/middle", "qcow2"),
        ("/base", "raw"),
    ]


def described(**options: Any) -> str:
    return "json:" + json.dumps(options)


@pytest.mark.parametrize(
    ("filename", "path", "offset"),
    [
        ("/with:colon", "/with:colon", 0),
        ("nbd://host:10809/x", "nbd://host:10809/x", 0),
        (described(driver="raw", offset=4096, file={"driver": "file", "filename": "/d"}), "/d", 4096),
        (described(driver="qcow2", backing={"driver": "raw"}, file={"driver": "file", "filename": "/o"}), "/o", 0),
        (described(driver="raw", file={"driver": "rbd", "pool": "p"}), '{"driver": "rbd", "pool": "p"}', 0),
        ("json:{", "json:{", 0),
    ],
)
def test_path_and_offset_are_parsed(filename: str, path: str, offset: int) -> None:
    (layer,) = parsed(block("d", top=image(filename))).layers
    assert (layer.path, layer.offset) == (path, offset)


def test_drivers_are_those_of_files_and_exports() -> None:
    nodes = [("/d", "raw"), ("/d", "file"), ("nbd://h/x", "nbd"), ("nbd://h/x", "qcow2"), ("/t", "throttle")]
    assert block_devices.drivers([{"file": file, "drv": driver} for file, driver in nodes]) == {
        "/d": "file",
        "nbd://h/x": "nbd",
    }


def test_tpm_is_part_of_the_device_state() -> None:
    options = {"type": "emulator", "data": {"chardev": "chrtpm"}}
    (tpm,) = block_devices.parse_tpms([{"id": "tpm0", "model": "tpm-tis", "options": options}])
    record = DiskRecord(devices=(tpm,))
    assert (tpm.id, tpm.layers[0].format, tpm.in_state) == ("tpm0", "tpm-emulator", True)
    assert record.media == ()
    assert unsaved(record) is None
    check_migration(record, record, "web", shared=False)
    check_restore(record, record, "image", "web", as_is=False)
    with pytest.raises(WorkloadError, match="the source has the drives tpm0, web has no drives"):
        check_migration(record, DiskRecord(), "web", shared=True)


# -- encoding ----------------------------------------------------------------------------------------------------------


def file(inode: int = 1, **changes: Any) -> File:
    return msgspec.structs.replace(File(device=8, inode=inode, fsid=5, fs="ext4", source="/dev/sda1"), **changes)


def disk(name: str = "a", number: int = 1, **changes: Any) -> BlockDevice:
    """Return a disk with one image in a file."""
    layer = Layer(format="raw", path=f"/{number}", size=MIB, driver="file", file=file(number))
    return msgspec.structs.replace(BlockDevice(id=name, name=name, layers=(layer,)), **changes)


def record(*devices: BlockDevice, host: Host = HERE) -> DiskRecord:
    return DiskRecord(host=host, devices=devices)


def packed(data: bytes) -> dict[str, Any]:
    return {"disks": base64.b64encode(zlib.compress(data)).decode()}


def test_encoded_record_is_decoded() -> None:
    made = record(disk("a", 1), disk("b", 2, read_only=True), BlockDevice(id="cd"))
    assert block_devices.decode({"disks": block_devices.encode(made)}) == made


def test_details_without_a_record_are_decoded_as_unknown() -> None:
    assert block_devices.decode({"machine": "pc"}) is None


def test_record_of_a_later_version_is_unknown() -> None:
    assert block_devices.decode(packed(b'{"version":2,"devices":"?"}')) is None


def test_additional_fields_are_ignored() -> None:
    found = block_devices.decode(packed(b'{"version":1,"new":1,"devices":[{"id":"a","new":[]}]}'))
    assert found == DiskRecord(devices=(BlockDevice(id="a"),))


@pytest.mark.parametrize(
    "details",
    [
        {"disks": 7},
        {"disks": True},
        {"disks": "?"},
        {"disks": base64.b64encode(b"no zlib").decode()},
        packed(b"no JSON"),
        packed(b"{}"),
        packed(b'{"version":1,"devices":[{}]}'),
        packed(b'{"version":1,"devices":[{"id":"a","layers":[{"format":"raw","path":"/","size":-1}]}]}'),
        packed(b'{"version":1,"more":"' + b"x" * (2 << 20) + b'"}'),
        {"disks": packed(b'{"version":1}')["disks"][:20]},
    ],
)
def test_invalid_record_is_refused(details: dict[str, Any]) -> None:
    with pytest.raises(WorkloadError, match="invalid record of disks"):
        block_devices.decode(details)


def test_record_of_many_disks_and_backing_files_fits_into_a_detail() -> None:
    layers = [
        Layer(format="qcow2", path=f"/var/lib/images/{number}.qcow2", size=MIB, driver="file", file=file(number * 977))
        for number in range(200)
    ]
    assert len(block_devices.encode(record(disk(layers=tuple(layers))))) < MAX_DETAIL
    assert len(block_devices.encode(record(*(disk(f"d{number}", number * 977) for number in range(60))))) < MAX_DETAIL


# -- comparison of images ----------------------------------------------------------------------------------------------


def compared(one: File | str, other: File | str, there: Host = HERE, **how: Any) -> Sameness:
    """Compare two files, or exports given by their URIs."""

    def layer(what: File | str) -> Layer:
        if isinstance(what, str):
            return Layer(format="raw", path=what, size=MIB, driver="nbd")
        return Layer(format="raw", path="/d", size=MIB, driver="file", file=what)

    return sameness(layer(one), layer(other), there, HERE, **how)


def test_files_of_one_host_are_compared_by_inode() -> None:
    assert compared(file(1), file(1)) is Sameness.SAME
    assert compared(file(1), file(2)) is Sameness.OTHER
    assert compared(file(1), file(1, device=9)) is Sameness.OTHER


def test_local_files_of_two_hosts_are_unknown() -> None:
    assert compared(file(1), file(1), THERE) is Sameness.UNKNOWN


def test_clones_of_one_host_are_two_hosts_while_both_run() -> None:
    assert compared(file(1), file(1), RESTARTED) is Sameness.UNKNOWN
    assert compared(file(1, device=9), file(1), RESTARTED, restarted=True) is Sameness.SAME
    assert compared(file(1, fsid=6), file(1), RESTARTED, restarted=True) is Sameness.UNKNOWN
    assert compared(file(1), file(1), THERE, restarted=True) is Sameness.UNKNOWN


def test_hosts_without_ids_are_not_the_same() -> None:
    same = Layer(format="raw", path="/d", size=MIB, driver="file", file=file(1))
    assert sameness(same, same, Host(), Host()) is Sameness.UNKNOWN
    assert sameness(same, same, Host(), Host(), restarted=True) is Sameness.UNKNOWN


@pytest.mark.parametrize(
    ("fs", "source", "expected"),
    [
        ("nfs4", "server:/export", Sameness.SAME),
        ("nfs", "[fd00::1]:/export", Sameness.SAME),
        ("ceph", "10.0.0.1:6789,10.0.0.2:6789:/", Sameness.SAME),
        ("ceph", "user@7b0e.files=/", Sameness.SAME),
        ("fuse.glusterfs", "server:/volume", Sameness.SAME),
        ("gfs2", "/dev/mapper/shared", Sameness.SAME),
        ("nfs4", "localhost:/export", Sameness.UNKNOWN),
        ("nfs4", "127.0.0.1:/export", Sameness.UNKNOWN),
        ("nfs4", "[::1]:/export", Sameness.UNKNOWN),
        ("nfs4", "/export", Sameness.UNKNOWN),
        ("virtiofs", "share", Sameness.UNKNOWN),
        ("9p", "share", Sameness.UNKNOWN),
        ("cifs", "//server/share", Sameness.UNKNOWN),
        ("fuse.sshfs", "user@server:/volume", Sameness.UNKNOWN),
    ],
)
def test_files_on_servers_are_compared_by_server_and_inode(fs: str, source: str, expected: Sameness) -> None:
    one = file(1, fs=fs, source=source)
    assert compared(one, file(1, fs=fs, source=source, device=9), THERE) is expected
    assert compared(one, file(2, fs=fs, source=source, device=9), THERE) is Sameness.UNKNOWN
    assert compared(one, file(1, fs=fs, source=f"{source}2", fsid=6), THERE) is Sameness.UNKNOWN


@pytest.mark.parametrize("host", [HERE, THERE])
@pytest.mark.parametrize("driver", ["file", "host_device", ""])
def test_files_that_were_not_found_are_unknown(driver: str, host: Host) -> None:
    lost = Layer(format="raw", path="/d", size=MIB, driver=driver)
    assert sameness(lost, lost, host, HERE) is Sameness.UNKNOWN


def test_block_devices_are_compared_by_number_or_world_wide_name() -> None:
    one = File(kind="device", device=0x800)
    assert compared(one, one) is Sameness.SAME
    assert compared(one, File(kind="device", device=0x801)) is Sameness.OTHER
    assert compared(one, one, THERE) is Sameness.UNKNOWN
    named = msgspec.structs.replace(one, serial="naa.5000c500")
    assert compared(named, msgspec.structs.replace(named, device=0x801), THERE) is Sameness.SAME


@pytest.mark.parametrize(
    ("uri", "elsewhere"),
    [
        ("nbd://storage:10809/x", Sameness.SAME),
        ("nbd://localhost:10809/x", Sameness.UNKNOWN),
        ("nbd+unix:///x?socket=/run/nbd", Sameness.UNKNOWN),
    ],
)
def test_exports_are_compared_by_uri(uri: str, elsewhere: Sameness) -> None:
    assert compared(uri, uri) is Sameness.SAME
    assert compared(uri, uri, THERE) is elsewhere
    assert compared(uri, f"{uri}2") is Sameness.OTHER
    assert compared(uri, f"{uri}2", THERE) is Sameness.UNKNOWN
    assert compared(uri, file(1)) is Sameness.UNKNOWN


# -- comparison of records ---------------------------------------------------------------------------------------------


def restored(before: BlockDevice, now: BlockDevice, *, as_is: bool = False) -> str:
    """Return the reason why a restore is refused; an empty text if it is accepted."""
    try:
        check_restore(record(before), record(now), "image", "web", as_is=as_is)
    except DisksDiffer as refused:
        return str(refused)
    return ""


def written(size: int = MIB, modified: int = 10**18, **changes: Any) -> BlockDevice:
    """Return a disk with a generation."""
    generation = Generation(size=size, modified=modified, **changes)
    layer = msgspec.structs.replace(disk().layers[0], file=file(1, generation=generation))
    return disk(layers=(layer,))


def test_unchanged_disk_is_accepted() -> None:
    assert restored(written(), written()) == ""
    assert restored(written(), written(settled=False)) == ""


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (written(), written(modified=10**18 + 1), "modified at 2001-09-09T01:46:40.000000Z"),
        (written(), written(size=2), "has changed since the checkpoint"),
        (written(settled=False), written(), "milliseconds before"),
        (disk(), written(), "cannot determine whether /1"),
        (written(), disk(), "cannot determine whether /1"),
        (written(modified=10**30), written(), "before the checkpoint at 1000000000000000000000 s"),
    ],
)
def test_changed_and_unknown_disks_are_refused(before: BlockDevice, now: BlockDevice, words: str) -> None:
    assert words in restored(before, now)
    assert "--disks as-is" in restored(before, now)
    assert restored(before, now, as_is=True) == ""


def test_guest_without_disks_is_accepted_without_a_record() -> None:
    check_restore(None, record(BlockDevice(id="cd")), "image", "web", as_is=False)
    check_migration(None, record(BlockDevice(id="cd")), "web", shared=False)


def test_disks_without_a_record_are_refused() -> None:
    with pytest.raises(DisksDiffer, match="image describes no disks, but web has disks"):
        check_restore(None, record(disk()), "image", "web", as_is=False)
    check_restore(None, record(disk()), "image", "web", as_is=True)
    with pytest.raises(WorkloadError, match="the source describes no disks, but web has disks"):
        check_migration(None, record(disk()), "web", shared=False)


def test_remark_names_the_disk_of_the_source_that_was_found() -> None:
    source, swapped = record(disk("a", 1), disk("b", 2)), record(disk("a", 2), disk("b", 1))
    check_migration(source, source, "web", shared=False)
    check_migration(source, swapped, "web", shared=True)
    with pytest.raises(WorkloadError, match=re.escape("/2 (a of web) is not /1 of the source, but b;")):
        check_migration(source, swapped, "web", shared=False)


@pytest.mark.parametrize(
    "sent",
    [
        disk(in_state=True),
        disk(layers=(*disk().layers, *disk().layers)),
        disk(layers=(Layer(format="raw over raw", path="/1", size=MIB, driver="file", file=file(1)),)),
    ],
)
def test_record_of_a_hostile_peer_is_refused(sent: BlockDevice) -> None:
    own = record(disk())
    for one, other in ((record(sent), own), (own, record(sent))):
        with pytest.raises(WorkloadError, match="has the format"):
            check_migration(one, other, "web", shared=False)
        with pytest.raises(DisksDiffer, match="has the format"):
            check_restore(one, other, "image", "web", as_is=False)


def test_only_empty_overlays_of_the_same_size_are_removed() -> None:
    (base,) = disk().layers
    overlay = Layer(format="qcow2", path="/o", size=MIB, file=file(9))
    both, one = record(disk(layers=(overlay, base))), record(disk())
    assert without_overlays(both, frozenset({"/o"}), one) == one
    assert without_overlays(both, frozenset(), one) == both
    assert without_overlays(both, frozenset({"/o"}), both) == both
    larger = msgspec.structs.replace(overlay, size=2 * MIB)
    assert without_overlays(record(disk(layers=(larger, base))), frozenset({"/o"}), one) != one


# -- choice of the disks to copy ---------------------------------------------------------------------------------------


class Targets(Storage):
    """Storage of a destination. If `empty` is true, none of its images contains data; otherwise, all of them do."""

    def __init__(self, *, empty: bool) -> None:
        super().__init__(os.getpid())
        self._empty = empty

    def is_empty(self, layer: Layer) -> bool:
        return self._empty


def device(serial: str) -> BlockDevice:
    """Return a disk whose image is a block device."""
    layer = Layer(format="raw", path="/dev/sdb", size=MIB, file=File(kind="device", device=0x810, serial=serial))
    return BlockDevice(id="a", name="a", layers=(layer,))


def chosen(one: BlockDevice, other: BlockDevice, *, empty: bool = True, shared: bool = False) -> tuple[int, ...]:
    theirs, ours = record(one, host=THERE), record(other)
    return disk_choice.choose(theirs, ours, "web", Targets(empty=empty), shared=shared)


def test_device_is_copied_to_a_device_that_is_known_to_be_another() -> None:
    assert chosen(device("naa.1"), device("naa.2")) == (0,)
    assert chosen(device("naa.1"), device("naa.2"), shared=True) == (0,)
    assert chosen(device("naa.1"), device("naa.1"), empty=False) == ()
    assert chosen(device("mpath-3600508"), device("naa.600509")) == (0,)
    assert chosen(device("LVM-abc"), device("mpath-3600508")) == (0,)
    assert chosen(disk(), device("")) == chosen(device(""), disk()) == (0,)


@pytest.mark.parametrize(
    "names", [("", ""), ("naa.1", ""), ("", "naa.1"), ("mpath-3600508", "naa.600508"), ("naa.600508", "mpath-3600508")]
)
def test_device_that_may_be_that_of_the_source_is_not_copied(names: tuple[str, str]) -> None:
    one, other = map(device, names)
    for empty in (True, False):
        with pytest.raises(WorkloadError, match="the world-wide names of the devices do not show"):
            chosen(one, other, empty=empty)
    assert chosen(one, other, empty=False, shared=True) == ()
    with pytest.raises(WorkloadError, match="is shared, or an empty device for a copy"):
        chosen(one, other, shared=True)
