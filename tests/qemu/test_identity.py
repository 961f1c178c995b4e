"""Tests of the identity of guests: generation ID, clock, addresses and placeholders, in restores and migrations."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import pageferry
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.errors import AddressInUse, RestoreError, UsageError
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.conftest import CACHE
from tests.guest import identity
from tests.guest.machines import GuestParts
from tests.guest.restored import restored
from tests.guest.serial import Serial
from tests.guest.travel import Traveller, travelling
from tests.kernel import moving

pytestmark = [pytest.mark.usefixtures("root", "registry")]

GUID = "01234567-89ab-cdef-0123-456789abcdef"
VMGENID = ("-device", f"vmgenid,id=generation,guid={GUID}")


async def saved(command: Sequence[str], image: Path, serial: Serial | None = None, lines: int = 5) -> None:
    """Write an image of a guest with this command line. `serial`: its serial line, if it reports its identity."""
    source = await QemuWorkload.start("source", command)
    if serial is not None:
        await identity.wait_for(serial, lines)
    await pageferry.checkpoint_async(source, image)
    await source.discard()


def refused(guest: Traveller, command: Sequence[str]) -> str:
    """Migrate a guest to a receiver with another command line. Check that the receiver refuses the guest. Return the
    message of the source."""
    with guest.receiver(command=command, stderr=subprocess.DEVNULL) as there:
        migration = guest.migrating(moving.address_of(there), stderr=subprocess.PIPE)
        with migration:
            assert migration.wait() == 21
            assert migration.process.stderr is not None
            with migration.process.stderr as stderr:
                said: str = stderr.read().decode()
        there.process.terminate()
        there.wait()
    return said


async def ask(workload: QemuWorkload, command: str, **arguments: Any) -> Any:
    async with await Monitor.open(workload.qmp_socket) as monitor:
        return await monitor.execute(command, **arguments)


async def guid_of(workload: QemuWorkload) -> str:
    return str((await ask(workload, "query-vm-generation-id"))["guid"])


@pytest.mark.oldest_qemu
def test_restored_guests_have_new_generation_ids_by_default(parts: GuestParts, tmp_path: Path) -> None:
    command, image = parts.bare("-m", "64M", *VMGENID), tmp_path / "image"

    async def run() -> None:
        await saved(command, image)
        assert ImageFile(image).metadata.details["generation-id"] == GUID
        async with restored("a", image, command) as first, restored("b", image, command) as second:
            guids = {await guid_of(first), await guid_of(second), GUID}
            assert len(guids) == 3
            assert first.generation_id in guids
        other = str(uuid.uuid4())
        json = parts.bare("-m", "64M", "-device", '{"driver":"vmgenid","id":"generation","guid":"auto"}')
        for choice, expected in (("image", GUID), (other.upper(), other)):
            for words in (command, json):
                async with restored("a", image, words, guid=choice) as kept:
                    assert await guid_of(kept) == expected

    asyncio.run(run())


def test_generation_id_that_the_command_line_overrides_is_refused(newest_parts: GuestParts, tmp_path: Path) -> None:
    command, image = newest_parts.bare("-m", "64M", *VMGENID), tmp_path / "image"

    async def run() -> None:
        await saved(command, image)
        fixed = [*command, "-set", f"device.generation.guid={GUID}"]
        with pytest.raises(RestoreError, match=f"a new generation ID: that of the image, {GUID}"):
            await restore_guest("a", image, fixed)
        with pytest.raises(RestoreError, match=f"the guest has {GUID}"):
            await restore_guest("a", image, fixed, guid=str(uuid.uuid4()))
        async with restored("a", image, fixed, guid="image") as kept:
            assert await guid_of(kept) == GUID

    asyncio.run(run())


def test_restored_guest_without_generation_id_is_reported(
    newest_parts: GuestParts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command, image = newest_parts.bare("-m", "64M"), tmp_path / "image"

    async def run() -> None:
        await saved(command, image)
        with caplog.at_level(logging.WARNING):
            async with restored("a", image, command) as workload:
                assert workload.generation_id is None
        assert "a: without a vmgenid device" in caplog.text
        with pytest.raises(UsageError, match="the image does not record one"):
            await restore_guest("a", image, command, guid="image")
        with pytest.raises(RestoreError, match=f"generation ID {GUID}: the guest has none"):
            await restore_guest("a", image, command, guid=GUID)
        with pytest.raises(UsageError, match="invalid `guid` 'auto': expected new, image, or a GUID"):
            await restore_guest("a", image, command, guid="auto")

    asyncio.run(run())


def test_migration_requires_the_generation_id_of_the_source(newest_parts: GuestParts, tmp_path: Path) -> None:
    with travelling(newest_parts, tmp_path, *VMGENID, memory="64M", checker=None) as guest:
        said = refused(guest, [*newest_parts.bare("-m", "64M"), "-device", "vmgenid,id=generation,guid=auto"])
        assert f"start the destination with -device vmgenid,guid={GUID} (not guid=auto)" in said
        guest.untouched()
        guest.move()
        assert guest.qmp("query-vm-generation-id")["guid"] == GUID


def test_guest_with_a_new_generation_id_reseeds_its_random_numbers(
    newest_parts: GuestParts, generic_kernel: Path, tmp_path: Path
) -> None:
    parts, image = identity.parts(newest_parts.qemu, generic_kernel, CACHE / "guest/identity"), tmp_path / "image"
    reseeded = "crng reseeded due to virtual machine fork"

    def command(serial: Serial) -> list[str]:
        return parts.command(serial, *VMGENID, memory="192M", checker="ferry.pause=20 loglevel=6")

    async def lines(name: str, **options: str) -> tuple[list[identity.Report], bool]:
        """Restore a guest. Return its lines, and whether its kernel reports another generation ID."""
        serial = Serial(tmp_path / name)
        async with restored(name, image, command(serial), **options):
            return await identity.wait_for(serial, 20), reseeded in serial.text

    async def run() -> None:
        source = Serial(tmp_path / "source")
        await saved(command(source), image, source)
        (first, told), (second, also_told) = await lines("a"), await lines("b")
        assert told
        assert also_told
        assert first[0].number == second[0].number
        # The kernel handles the notification of QEMU a moment after the guest runs.
        assert not {report.random for report in first[5:]} & {report.random for report in second}
        assert not (await lines("c", guid="image"))[1]

    asyncio.run(run())


@pytest.fixture(scope="module")
def image_with_clock(
    parts: GuestParts, guest_kernel: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GuestParts, Path]:
    """Return the parts of a guest whose RTC is in 2020, and the path of its image, which is 4 s old."""
    guest = identity.parts(parts.qemu, guest_kernel, CACHE / "guest/identity")
    folder = tmp_path_factory.mktemp("clock")
    serial = Serial(folder / "serial")
    command = guest.command(serial, "-rtc", "base=2020-01-01T00:00:00", memory="192M", checker="")
    asyncio.run(saved(command, folder / "image", serial))
    asyncio.run(asyncio.sleep(4))
    return guest, folder / "image"


@pytest.mark.parametrize(("options", "passes"), [({}, True), ({"clock": "host"}, True), ({"clock": "image"}, False)])
def test_clock_of_restored_guest_continues_from_host_or_image(
    image_with_clock: tuple[GuestParts, Path], tmp_path: Path, options: dict[str, str], passes: bool
) -> None:
    parts, image = image_with_clock
    serial = Serial(tmp_path / "serial")
    before = identity.reports(Serial(image.with_name("serial")))[-1]

    async def run() -> None:
        async with restored("a", image, parts.command(serial, memory="192M", checker=""), **options):
            first, *_, last = await identity.wait_for(serial, 20)
        jumped = first.rtc - before.rtc - (first.up - before.up) // 1000
        assert (jumped >= 3) == passes, (before, first)
        assert last.rtc - first.rtc <= 2 + (last.up - first.up) // 1000
        # The system time always continues from the image.
        assert first.wall - before.wall <= 1 + (first.up - before.up) // 1000

    asyncio.run(run())


def test_clock_that_would_be_wrong_is_refused(newest_parts: GuestParts, tmp_path: Path) -> None:
    image = tmp_path / "image"

    async def run() -> None:
        command = newest_parts.bare("-m", "64M")
        await saved([*command, "-rtc", "clock=vm"], image)
        with pytest.raises(RestoreError, match="saved with -rtc clock=vm, and the command line has clock=host"):
            await restore_guest("a", image, command)
        with pytest.raises(UsageError, match="cannot set the RTC to the time of the host"):
            await restore_guest("a", image, command, clock="host")
        async with restored("a", image, command, clock="image") as workload:
            assert workload.identity.details["rtc-clock"] == "vm"
            year = (await ask(workload, "qom-get", path="/machine", property="rtc-time"))["tm_year"]
            assert 2020 < 1900 + year < 2060

    asyncio.run(run())


def test_migration_requires_the_clock_of_the_source(newest_parts: GuestParts, tmp_path: Path) -> None:
    with travelling(newest_parts, tmp_path, "-rtc", "clock=rt", memory="64M", checker=None) as guest:
        said = refused(guest, newest_parts.bare("-m", "64M"))
        assert "the source has -rtc clock=rt, guest-1 at the destination has clock=host" in said
        guest.untouched()
        guest.move()


def test_command_line_with_placeholders_serves_several_guests(newest_parts: GuestParts, tmp_path: Path) -> None:
    image = tmp_path / "image"
    command = newest_parts.bare(
        "-m", "64M", "-name", "{name}", "-qmp", f"unix:{tmp_path}/{{name}}.qmp,server=on,wait=off"
    )

    async def run() -> None:
        await saved(command, image)
        async with restored("a", image, command) as first, restored("b", image, command) as second:
            assert [(await ask(one, "query-name"))["name"] for one in (first, second)] == ["a", "b"]
            assert (tmp_path / "a.qmp").is_socket()

    asyncio.run(run())


def test_socket_of_another_guest_is_refused_before_qemu_starts(newest_parts: GuestParts, tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    command = newest_parts.bare("-m", "64M", "-qmp", f"unix:{path},server=on,wait=off")

    async def run() -> None:
        first = await QemuWorkload.start("a", command)
        inode = path.stat().st_ino
        with pytest.raises(AddressInUse, match=re.escape(f"cannot start b: unix:{path} (option -qmp) is in use")):
            await QemuWorkload.start("b", command)
        assert list(Registry().entries()) == ["a"]
        assert path.stat().st_ino == inode
        async with await Monitor.open(str(path)) as monitor:
            await monitor.execute("query-status")
        await first.discard()

    asyncio.run(run())
