"""Generation ID of a guest (QEMU's device `vmgenid`), by which a guest detects that it continues from an older state.

The GUID of the device is part of QEMU's command line, not of the device state. When QEMU loads a state, it writes the
GUID into guest memory and notifies the guest. A guest whose GUID has changed discards its pool of random numbers, and
Windows also protects its directory services. Therefore, the following rules apply:

1. A migration does not change the GUID. QEMU does not check this; `check_migration` does.
2. A restore changes the GUID, because the guest returns to an older state and may run more than once. `with_guid`
   replaces the GUID in the command line.
3. Clones have different GUIDs; `check_clones` refuses others.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pageferry.errors import RestoreError, UsageError, WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.workloads.qemu.option_syntax import option_values, properties, with_property

DETAIL = "generation-id"
"""Detail of an identity: GUID of the guest, in lower case. A guest without the device does not have the detail."""

DEVICE = "vmgenid"
"""QEMU's type of the device. A machine has at most one."""

NEW, IMAGE = "new", "image"
"""Choices for a restore other than a GUID: a random GUID, and the GUID that the image records."""


async def query(monitor: Monitor, devices: Sequence[tuple[str, str]]) -> str | None:
    """Return the GUID of a guest (QMP `query-vm-generation-id`); None if the guest has no device for it. `devices`:
    type and id of each device."""
    if not any(kind == DEVICE for kind, _ in devices):
        return None
    return str((await monitor.execute("query-vm-generation-id"))["guid"]).lower()


def check_choice(name: str, choice: str) -> str:
    """Return the choice for a restore: `new`, `image`, or a GUID in lower case. Raises UsageError."""
    if choice in (NEW, IMAGE):
        return choice
    try:
        return str(uuid.UUID(choice))
    except ValueError:
        raise UsageError(
            f"invalid `{name}` {choice!r}: expected new, image, or a GUID such as {uuid.UUID(int=0)}"
        ) from None


def choose(choice: str, details: Mapping[str, Any] | None, path: str) -> str:
    """Return the GUID of a guest that is restored. `details`: details of the image at `path`, needed for `image`.
    Raises UsageError if the image does not record a GUID."""
    if choice == NEW:
        return str(uuid.uuid4())
    if choice != IMAGE:
        return choice
    if details is None or DETAIL not in details:
        raise UsageError(
            f"cannot keep the generation ID of {path}: the image does not record one; remove the option, or give the "
            "GUID itself"
        )
    return str(details[DETAIL])


def with_guid(arguments: Sequence[str], guid: str) -> list[str]:
    """Return the command line in which the device `vmgenid`, if there is one, has this GUID. Raises UsageError."""
    result = list(arguments)
    for name, value, index in option_values(arguments):
        if name == "device" and properties(value, "driver").get("driver") == DEVICE:
            result[index] = with_property(value, "guid", guid)
    return result


def check_migration(details: Mapping[str, Any], own: str | None, here: str) -> None:
    """Raise WorkloadError if the guest of a migration would have another GUID at the destination. `details`: details of
    the source. `own`: GUID at the destination. `here`: name of the destination, for error messages."""
    expected = details.get(DETAIL)
    if expected is not None and own != expected:
        raise WorkloadError(
            f"the generation IDs do not match: the source has {expected}, {here} has {own or 'none'}; start the "
            f"destination with -device {DEVICE},guid={expected} (not guid=auto)"
        )


def check_restored(chosen: str, choice: str, recorded: Any, own: str | None) -> None:
    """Raise WorkloadError if a guest, which has not run yet, does not have the chosen GUID.

    The command line can be a script, in which `with_guid` replaces nothing. With the choice `new`, any GUID other than
    the one that the image records is accepted, and also a guest without the device. `own`: GUID of the guest.
    """
    if choice == NEW:
        if own is not None and own == recorded:
            raise WorkloadError(
                f"cannot give the guest a new generation ID: that of the image, {own}, is set in a program or by -set; "
                "set another one there, or keep it with --guid image"
            )
    elif own != chosen:
        raise WorkloadError(
            f"cannot give the guest the generation ID {chosen}: the guest has {own or 'none'}; add -device {DEVICE} "
            "to the command line, and remove -set for this device"
        )


def check_clones(guests: Iterable[tuple[str, str | None]]) -> None:
    """Raise RestoreError if two guests have the same GUID. `guests`: name and GUID of each, None without the device."""
    owners: dict[str, str] = {}
    for name, own in guests:
        if own is not None and owners.setdefault(own, name) != name:
            raise RestoreError(
                f"cannot start {owners[own]} and {name}: both have the generation ID {own}, which is set in a program "
                "or by -set; remove that setting, or add {n} or {name} to it"
            )
