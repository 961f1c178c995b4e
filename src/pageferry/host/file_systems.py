"""Types of file systems (`f_type` of statfs(2), which Python does not report), and the types that keep files in
memory."""

from __future__ import annotations

from pageferry import _engine

TMPFS, HUGETLBFS = 0x01021994, 0x958458F6
"""Magic numbers of include/uapi/linux/magic.h; a memfd is on one of these two file systems."""

_NAMES = {
    TMPFS: "tmpfs",
    HUGETLBFS: "hugetlbfs",
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0x794C7630: "overlayfs",
    0x65735546: "fuse",
    0x6969: "nfs",
}


def file_system(descriptor: int) -> int:
    """Return the magic number of the file system of an open file; O_PATH suffices. Raises OSError."""
    return _engine.file_system_type(descriptor)


def in_memory(descriptor: int) -> bool:
    """Return whether an open file is stored in memory: on tmpfs or hugetlbfs, or as a memfd. Raises OSError."""
    return file_system(descriptor) in (TMPFS, HUGETLBFS)


def name_of(kind: int) -> str:
    """Return the name of a file system type, given by its magic number; for an unknown type, a text with the number."""
    return _NAMES.get(kind, f"a file system of type {kind:#x}")
