"""Replacement of disks in the command line of QEMU: an overlay replaces the file of a `-drive` or `-blockdev`.

The devices of the guest stay as they are. Only the option that names the file of a disk changes::

    -drive file=web.raw,format=raw,if=virtio,id=a     ->  -drive file=OVERLAY,format=qcow2,if=virtio,id=a
    -blockdev driver=raw,node-name=a,file.filename=.. ->  -blockdev driver=qcow2,node-name=a,file.filename=OVERLAY
    -blockdev '{"driver": "raw", "node-name": "a", "file": "f"}'   the same in JSON; the file of node `f` is replaced

A disk is found by the id of its `-drive`, by the `node-name` of its `-blockdev`, or by the id of its `-device`. In all
other cases, such as `-hda` and drives without an id, the user writes `{disk:ID}` in place of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pageferry.errors import UsageError
from pageferry.workloads.qemu.block_devices import BlockDevice
from pageferry.workloads.qemu.option_syntax import (
    DISK_OPTIONS,
    ON,
    block_properties,
    flat,
    option_values,
    options,
    properties,
)

_PLACEHOLDER = re.compile(r"\{disk:([^{}]+)\}")
_CHAIN_OF_DRIVE = re.compile(r"file|format|driver|offset|size|backing(\..*)?|file\..*")
"""Properties of `-drive` that describe a chain of images, which the overlay replaces."""
_CHAIN_OF_NODE = frozenset({"driver", "file", "filename", "backing", "offset", "size"})
"""Properties of a block node that describe a chain of images."""
_OPTIONS_OF_FILE = frozenset({"aio", "locking", "cache"})
"""Options of the file of a block node that an overlay keeps."""
_FILTERS = frozenset({"throttle", "copy-on-read"})
"""Block drivers that stay on top of the overlay."""


def replace_disks(arguments: Sequence[str], overlays: Mapping[str, str], disks: Sequence[BlockDevice]) -> list[str]:
    """Return the command line of QEMU with the files of disks replaced. `overlays`: path by id of the disk. `disks`:
    the disks that an image has recorded.

    Raises UsageError, which states the option to use, if a disk cannot be found in the command line.
    """
    words = list(arguments)
    done = _replace_placeholders(words, overlays, disks)
    for disk in disks:
        if disk.id in overlays and disk.id not in done:
            _replace(words, disk, overlays[disk.id])
    return words


def has_disks(arguments: Sequence[str]) -> bool:
    """Return whether a command line may attach disks. Raises UsageError."""
    if not arguments:
        return False
    names = {name for name, _, _ in option_values(arguments)}
    return bool(names & {"drive", "blockdev", *DISK_OPTIONS})


def written_files(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the paths of the files that QEMU would open for writing as disks. Raises UsageError."""
    given = list(options(arguments))
    if any(name == "snapshot" for name, _ in given):
        return
    for name, value in given:
        if name in DISK_OPTIONS - {"cdrom"}:
            name, value = "drive", f"file={value.replace(',', ',,')}"
        if name in ("drive", "blockdev"):
            implied = "driver" if name == "blockdev" else "file"
            found = dict(block_properties(value, implied))
            if any(found.get(key) in ON for key in ("readonly", "read-only", "snapshot")):
                continue
            for key, text in found.items():
                if _FILE_NAME.fullmatch(key):
                    yield _PROTOCOL.sub("", text) if name == "drive" else text


_PROTOCOL = re.compile(r"(file|host_device):")
"""Prefix with which QEMU accepts the path of a file or device, except in `-blockdev`."""

_FILE_NAME = re.compile(r"(file\.)*(file|filename)")
"""Properties that name the file of the image that a disk writes to, and not those of its backing images."""


def _replace_placeholders(words: list[str], overlays: Mapping[str, str], disks: Sequence[BlockDevice]) -> set[str]:
    """Replace each `{disk:ID}`. Return the ids of the disks."""
    ids = {name: disk.id for disk in disks for name in (disk.id, disk.name) if disk.id in overlays and name}
    done: set[str] = set()

    def overlay(found: re.Match[str]) -> str:
        if found[1] not in ids:
            known = ", ".join(sorted(disk.shown for disk in disks if disk.id in overlays)) or "none"
            raise UsageError(f"invalid placeholder {found[0]!r}: expected one of the saved disks ({known})")
        done.add(ids[found[1]])
        path = overlays[ids[found[1]]]
        return json.dumps(path)[1:-1] if found.string.startswith("{") else path.replace(",", ",,")

    words[:] = [_PLACEHOLDER.sub(overlay, word) for word in words]
    return done


def _replace(words: list[str], disk: BlockDevice, overlay: str) -> None:
    given = list(option_values(words))
    drives = {properties(value, "file").get("id", ""): (value, at) for name, value, at in given if name == "drive"}
    blocks = [(value, at) for name, value, at in given if name == "blockdev"]
    nodes = {properties(value, "driver").get("node-name", ""): (value, at) for value, at in blocks}
    for name in filter(None, (disk.name, _drive_of(given, disk))):
        if name in drives:
            value, at = drives[name]
            words[at] = _drive(value, overlay)
            return
        if name in nodes:
            _replace_node(words, nodes, name, overlay)
            return
    raise UsageError(_not_found(given, disk))


def _drive_of(given: Sequence[tuple[str, str, int]], disk: BlockDevice) -> str:
    """Return the drive of the `-device` with the id of a disk; empty if there is none."""
    for name, value, _ in given:
        if name == "device" and (found := properties(value, "driver")).get("id") == disk.id:
            return found.get("drive", "")
    return ""


def _not_found(given: Sequence[tuple[str, str, int]], disk: BlockDevice) -> str:
    short = sorted({f"-{name}" for name, _, _ in given if name in DISK_OPTIONS})
    cause = f"no -drive or -blockdev has this id{', and ' + ', '.join(short) + ' has no id' if short else ''}"
    return (
        f"cannot put an overlay on disk {disk.shown}: {cause}; attach it by `-drive file={{disk:{disk.shown}}},"
        "format=qcow2,...`, with its other properties unchanged, in place of the present option"
    )


# -- options


def _drive(value: str, overlay: str) -> str:
    """Return the value of a `-drive`, with an overlay in place of its file and backing chain."""
    kept = {key: text for key, text in properties(value, "file").items() if not _CHAIN_OF_DRIVE.fullmatch(key)}
    return _short({"file": overlay, "format": "qcow2", **kept})


def _replace_node(words: list[str], nodes: Mapping[str, tuple[str, int]], name: str, overlay: str) -> None:
    """Replace the file of a `-blockdev`, which may be described by another `-blockdev`."""
    value, at = nodes[name]
    node = _parsed(value)
    below = node.get("file")
    if not isinstance(below, str) or below not in nodes:
        words[at] = _written(value, _over(node, overlay))
    elif node.get("driver") in _FILTERS:
        _replace_node(words, nodes, below, overlay)
    else:
        words[at] = _written(value, {**_without_chain(node), "driver": "qcow2", "file": below})
        value, at = nodes[below]
        words[at] = _written(value, {**_without_chain(_parsed(value)), "driver": "file", "filename": overlay})


def _over(node: Mapping[str, Any], overlay: str) -> dict[str, Any]:
    """Return a block node with an overlay in place of its chain of images."""
    below = node.get("file")
    if node.get("driver") in _FILTERS and isinstance(below, dict):
        return {**node, "file": _over(below, overlay)}
    kept, described = _without_chain(node), below if isinstance(below, dict) else {}
    options = {key: item for key, item in described.items() if key in _OPTIONS_OF_FILE}
    if below is None:  # a file without an image format
        options = {key: kept.pop(key) for key in ("aio", "locking") if key in kept}
    if "cache" in kept:
        options.setdefault("cache", kept["cache"])
    return {**kept, "driver": "qcow2", "file": {**options, "driver": "file", "filename": overlay}}


def _without_chain(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in node.items() if key not in _CHAIN_OF_NODE}


def _parsed(value: str) -> dict[str, Any]:
    """Return the properties of a `-blockdev` as nested dictionaries. In the short form, all values are strings."""
    if value.startswith("{"):
        node: dict[str, Any] = json.loads(value)
        return node
    nested: dict[str, Any] = {}
    for key, text in properties(value, "driver").items():
        *parents, last = key.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = text
    return nested


def _written(value: str, node: Mapping[str, Any]) -> str:
    """Return a block node in the form of `value`, JSON or short."""
    return json.dumps(node) if value.startswith("{") else _short(dict(flat("", node)))


def _short(found: Mapping[str, str]) -> str:
    """Return properties in the short form of QEMU's options."""
    return ",".join(f"{key}={text.replace(',', ',,')}" for key, text in found.items())
