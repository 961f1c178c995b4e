"""Memory slots of a VM of Cloud Hypervisor, as listed in the payload of `Config`, and the state of an image.

`Config` is a JSON object. Its field `memory_manager_data` contains `guest_ram_mappings`: for each slot, its number, its
guest physical address, its length, and the position of its memory in the file of the slot. All other contents are
opaque: an image stores the bytes of `Config` and `State`, and a restore sends the same bytes.
"""

from __future__ import annotations

import itertools
from typing import Annotated

import msgspec
from msgspec import Meta

from pageferry.errors import ImageError
from pageferry.images.image import ImageFile
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager.cloud_hypervisor.protocol import MAX_CONFIG, MAX_STATE, InvalidMessage

MAX_SLOTS = 4096
"""Maximum number of slots, the limit of the regions of an image."""
MAX_LENGTH = 1 << 44
"""Maximum length of the memory of a slot, bytes."""
VERSION = 1
"""Version of `SavedVm`."""
_PREFIX = "slot"

_Bytes = Annotated[int, Meta(ge=0, lt=1 << 56)]


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """Memory slot of the VM. Unknown fields are ignored."""

    slot: Annotated[int, Meta(ge=0, lt=1 << 32)]
    """Number."""
    gpa: _Bytes
    """Guest physical address."""
    size: Annotated[int, Meta(gt=0, le=MAX_LENGTH)]
    """Length, bytes."""
    file_offset: _Bytes
    """Start in the file of the slot, bytes."""

    @property
    def region(self) -> str:
        """Name of the region of an image."""
        return f"{_PREFIX}{self.slot}"

    @property
    def file_length(self) -> int:
        """Length of the file of the slot, bytes."""
        return self.file_offset + self.size


class _MemoryData(msgspec.Struct):
    guest_ram_mappings: list[Slot]


class _Config(msgspec.Struct):
    memory_manager_data: _MemoryData


_config = msgspec.json.Decoder(_Config)


def parse_slots(config: bytes) -> tuple[Slot, ...]:
    """Return the memory slots in the payload of `Config`, in its order. Raises InvalidMessage."""
    try:
        found = _config.decode(config).memory_manager_data.guest_ram_mappings
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidMessage(f"invalid configuration of the VM: {error}") from error
    check_slots(found)
    return tuple(found)


def check_slots(slots: list[Slot]) -> None:
    """Raise InvalidMessage unless the slots are aligned and separate, and have different numbers."""
    if not 0 < len(slots) <= MAX_SLOTS:
        raise InvalidMessage(f"invalid memory slots: there are {len(slots)}, expected 1 to {MAX_SLOTS}")
    for slot in slots:
        for name, value in (("gpa", slot.gpa), ("size", slot.size), ("file_offset", slot.file_offset)):
            if value % SMALL_PAGE:
                raise InvalidMessage(
                    f"invalid memory slot {slot.slot}: {name} {value} is not a multiple of {SMALL_PAGE}"
                )
        if slot.file_length > 2 * MAX_LENGTH:
            raise InvalidMessage(f"invalid memory slot {slot.slot}: {slot.size} bytes at offset {slot.file_offset}")
    if len({slot.slot for slot in slots}) < len(slots):
        raise InvalidMessage("invalid memory slots: two of them have the same number")
    for one, other in itertools.pairwise(sorted(slots, key=lambda slot: slot.gpa)):
        if one.gpa + one.size > other.gpa:
            raise InvalidMessage(f"invalid memory slots: two of them contain address {other.gpa:#x}")


class SavedVm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """State of a VM in an image: payloads of Cloud Hypervisor, unchanged."""

    version: int = VERSION
    config: bytes
    """Payload of `Config`."""
    state: bytes
    """Payload of `State`."""

    def encode(self) -> bytes:
        """Return the contents of the section of the image."""
        return msgspec.msgpack.encode(self)


def saved_vm(image: ImageFile) -> tuple[SavedVm, tuple[Slot, ...]]:
    """Return the state of an image of a VM, and its memory slots in the order of the regions. Raises ImageError."""
    try:
        saved = msgspec.msgpack.decode(image.state(), type=SavedVm)
    except msgspec.MsgspecError as error:
        raise ImageError(f"{image.path} is damaged: its state is invalid ({error}); take another checkpoint") from error
    if saved.version != VERSION:
        raise ImageError(
            f"cannot read {image.path}: unsupported version {saved.version} of its state, this pageferry supports "
            f"{VERSION}; use the version that wrote the image"
        )
    try:
        slots = parse_slots(saved.config)
    except InvalidMessage as error:
        raise ImageError(f"{image.path} is damaged: {error}; take another checkpoint") from error
    ours = [(slot.region, slot.size) for slot in slots]
    stored = [(region.name, region.length) for region in image.metadata.regions]
    if ours != stored or len(saved.config) > MAX_CONFIG or len(saved.state) > MAX_STATE:
        raise ImageError(f"{image.path} is damaged: its regions are not the memory slots of its VM")
    return saved, slots
