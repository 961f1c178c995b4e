"""Handle of an arena for other processes of this host (see `handles`)."""

from __future__ import annotations

import msgspec

from pageferry.images.metadata import ImageIdentity


class OpenFile(msgspec.Struct, frozen=True, kw_only=True):
    """File that is open in the owner."""

    descriptor: int
    device: int
    inode: int


class Handle(msgspec.Struct, frozen=True, kw_only=True):
    """Handle of the memory of an arena."""

    pid: int
    """Process id of the owner."""
    started: int
    """Start time of the owner, clock ticks since boot."""
    descriptor: int
    """Descriptor of the memory in the owner."""
    device: int
    inode: int
    length: int
    """Length of the arena, bytes."""
    capacity: int = 0
    """Length up to which the arena can grow, bytes."""
    page: OpenFile
    """Access page of the arena (see `access_page`)."""
    name: str
    """Name of the arena, for error messages."""

    @property
    def file(self) -> tuple[int, int]:
        """Device and inode of the memory."""
        return self.device, self.inode


class SharedHandle(msgspec.Struct, frozen=True, kw_only=True):
    """Handle of memory that is shared with its image: another process opens the image itself."""

    image: str
    """Absolute path of the image."""
    identity: ImageIdentity

    @property
    def name(self) -> str:
        """Name of the memory, for error messages."""
        return self.image
