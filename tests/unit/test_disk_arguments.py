"""Tests of the replacement of disks in the command line of QEMU."""

from __future__ import annotations

import json

import pytest

from pageferry.errors import UsageError
from pageferry.workloads.qemu.block_devices import BlockDevice
from pageferry.workloads.qemu.disk_arguments import replace_disks, written_files

QEMU = "qemu-system-x86_64"
OVERLAY = "/new/a,b.qcow2"


def replaced(*arguments: str, id: str = "disk0", name: str = "a") -> list[str]:
    """Return the arguments with the overlay in place of one disk."""
    disk = BlockDevice(id=id, name=name)
    return replace_disks([QEMU, *arguments], {id: OVERLAY}, [disk])[1:]


def test_file_of_a_drive_is_replaced() -> None:
    drive = "file=/old,format=raw,if=virtio,id=a,cache=none,file.locking=on,backing.file.filename=/base"
    expected = "file=/new/a,,b.qcow2,format=qcow2,if=virtio,id=a,cache=none"
    assert replaced("-m", "64M", "-drive", drive, "-drive", "file=/c,id=c") == [
        *("-m", "64M", "-drive", expected, "-drive", "file=/c,id=c")
    ]


def test_drive_is_found_by_the_id_of_its_device() -> None:
    words = ["-drive", "file=/old,format=raw,if=none,id=d", "-device", "virtio-blk,drive=d,id=disk0"]
    assert replaced(*words, name="pageferry-1-0")[1] == "file=/new/a,,b.qcow2,format=qcow2,if=none,id=d"


def test_node_in_short_form_is_replaced() -> None:
    node = "driver=raw,node-name=a,file.driver=file,file.filename=/old,file.aio=native,cache.direct=on,offset=512"
    (_, new) = replaced("-blockdev", node)
    assert set(new.split(",", 20)) >= {"driver=qcow2", "node-name=a", "cache.direct=on", "file.aio=native"}
    assert "file.filename=/new/a,,b.qcow2" in new
    assert "/old" not in new
    assert "offset" not in new


def test_node_in_json_is_replaced() -> None:
    node = {"driver": "raw", "node-name": "a", "read-only": False, "file": {"driver": "file", "filename": "/old"}}
    (_, new) = replaced("-blockdev", json.dumps(node))
    assert json.loads(new) == {
        "driver": "qcow2",
        "node-name": "a",
        "read-only": False,
        "file": {"driver": "file", "filename": OVERLAY},
    }


def test_file_of_another_node_is_replaced() -> None:
    file = {"driver": "file", "node-name": "f", "filename": "/old", "auto-read-only": True}
    node = {"driver": "qcow2", "node-name": "a", "file": "f", "backing": "base"}
    new = replaced("-blockdev", json.dumps(file), "-blockdev", json.dumps(node))
    assert json.loads(new[1]) == {**file, "filename": OVERLAY}
    assert json.loads(new[3]) == {"driver": "qcow2", "node-name": "a", "file": "f"}


def test_filters_stay_on_top_of_the_overlay() -> None:
    inner = {"driver": "raw", "file": {"driver": "file", "filename": "/old"}}
    node = {"driver": "throttle", "node-name": "a", "throttle-group": "g", "file": inner}
    (_, new) = replaced("-blockdev", json.dumps(node))
    overlay = {"driver": "qcow2", "file": {"driver": "file", "filename": OVERLAY}}
    assert json.loads(new) == {**node, "file": overlay}


def test_bare_file_becomes_the_file_of_an_overlay() -> None:
    node = {"driver": "file", "node-name": "a", "filename": "/old", "aio": "native"}
    (_, new) = replaced("-blockdev", json.dumps(node))
    file = {"driver": "file", "filename": OVERLAY, "aio": "native"}
    assert json.loads(new) == {"driver": "qcow2", "node-name": "a", "file": file}


def test_placeholder_is_replaced() -> None:
    words = ["-drive", "file={disk:virtio0},format=qcow2,if=virtio"]
    assert replaced(*words, name="virtio0") == ["-drive", "file=/new/a,,b.qcow2,format=qcow2,if=virtio"]
    with pytest.raises(UsageError, match=r"invalid placeholder '\{disk:b\}': expected one of the saved disks"):
        replaced("-drive", "file={disk:b},id=b")


@pytest.mark.parametrize("words", [["-hda", "/old"], ["-drive", "file=/old,format=raw,if=virtio"], ["/old"], []])
def test_disk_without_an_id_is_refused_with_the_option_to_write(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"attach it by `-drive file=\{disk:a\},format=qcow2"):
        replaced(*words)


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["-drive", "file=/d,format=raw,if=virtio"], ["/d"]),
        (["-drive", "file.driver=file,file.filename=/d,if=virtio"], ["/d"]),
        (["-drive", "file=/d,readonly=on"], []),
        (["-drive", "file=/d,snapshot=on"], []),
        (["-hda", "/d", "-snapshot"], []),
        (["-hda", "/d", "-cdrom", "/c"], ["/d"]),
        (["/d"], ["/d"]),
        (["-drive", "file=file:/d,format=raw"], ["/d"]),
        (["-hda", "host_device:/d"], ["/d"]),
        (["-hda", 'json:{"driver": "file", "filename": "/d"}'], ["/d"]),
        (["-drive", "file=/o,format=qcow2,backing.file.filename=/d"], ["/o"]),
        (["-blockdev", '{"driver": "raw", "node-name": "a", "file": {"driver": "file", "filename": "/d"}}'], ["/d"]),
        (["-blockdev", '{"driver": "file", "node-name": "a", "filename": "/d", "read-only": true}'], []),
    ],
)
def test_files_that_a_guest_writes_to_are_found(words: list[str], paths: list[str]) -> None:
    found = [path for path in written_files([QEMU, *words]) if path.startswith("/")]
    assert found == paths
