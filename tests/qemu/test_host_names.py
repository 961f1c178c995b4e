"""Tests of the values that the options of QEMU pass to a restored guest: fw_cfg, SMBIOS, media and a chosen generation
ID, as docs/identity.md describes."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.errors import DisksDiffer
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest import shell
from tests.guest.machines import GuestParts
from tests.guest.restored import restored
from tests.guest.shell import ShellGuests
from tests.guest.travel import ask

pytestmark = [pytest.mark.usefixtures("root", "registry")]

ENTRY = "/sys/firmware/qemu_fw_cfg/by_name/opt/org.example/hostname/raw"
SERIAL = "cat /sys/class/dmi/id/product_serial"
RELOAD = "rmmod qemu_fw_cfg; insmod /modules/*-qemu_fw_cfg.ko"
"""Commands of a guest that read the directory of fw_cfg again."""
NAMES = (
    *("-fw_cfg", "name=opt/org.example/hostname,string={name}"),
    *("-smbios", "type=1,serial=ds=nocloud;h={name}"),
    *("-device", "vmgenid,id=generation,guid=00000000-0000-0000-0000-0000000000aa"),
    *("-device", "virtio-scsi-pci", "-drive", "if=none,id=seed", "-device", "scsi-cd,drive=seed"),
)


@pytest.fixture(scope="module")
def guests(newest_parts: GuestParts, identity_modules: Path, tmp_path_factory: pytest.TempPathFactory) -> ShellGuests:
    if (busybox := shutil.which("busybox")) is None:
        pytest.skip("no busybox in PATH (`make system` as root installs it)")
    return shell.build(newest_parts.qemu, identity_modules.parent, Path(busybox), tmp_path_factory.mktemp("shell"))


@pytest.fixture(scope="module")
def image(guests: ShellGuests) -> Path:
    """Return the path of the image of a guest with the name `web`."""
    image = guests.folder / "image"

    async def run() -> None:
        source = await QemuWorkload.start("web", guests.command(*NAMES))
        try:
            found = await guests.ask("web", f"cat {ENTRY}", SERIAL, booted=False)
            assert found == ["web", "ds=nocloud;h=web"]
            await pageferry.checkpoint_async(source, image)
        finally:
            await source.discard()

    asyncio.run(run())
    return image


def test_clones_read_their_names_from_fw_cfg_once_they_have_reloaded_its_driver(
    guests: ShellGuests, image: Path
) -> None:
    async def run() -> None:
        result = await pageferry.clone_async(image, guests.command(*NAMES), count=2, name="shell-{n}")
        for name in (clone.name for clone in result.clones):
            # The driver still has the sizes from the image, so it cuts the string.
            assert await guests.ask(name, f"cat {ENTRY}") == ["she"]
            told = await guests.ask(name, RELOAD, f"hostname $(cat {ENTRY})", "hostname")
            assert told[-1] == name
        for clone in result.clones:
            await pageferry.stop_async(clone.name)

    asyncio.run(run())


def test_driver_of_fw_cfg_reads_another_entry_if_the_command_line_has_more(guests: ShellGuests, image: Path) -> None:
    async def run() -> None:
        more = guests.command(*NAMES, "-fw_cfg", "name=opt/org.example/added,string=other")
        async with restored("more", image, more):
            assert await guests.ask("more", f"cat {ENTRY}") == ["oth"]
            assert (await guests.ask("more", RELOAD, f"cat {ENTRY}"))[-1] == "more"

    asyncio.run(run())


def test_restored_guest_has_the_smbios_tables_of_the_image_until_it_reboots(guests: ShellGuests, image: Path) -> None:
    async def run() -> None:
        async with restored("rebooted", image, guests.command(*NAMES)):
            assert await guests.ask("rebooted", SERIAL) == ["ds=nocloud;h=web"]
            await ask("rebooted", "system_reset")
            assert await guests.ask("rebooted", SERIAL, booted=False) == ["ds=nocloud;h=rebooted"]

    asyncio.run(run())


def seed(folder: Path, name: str) -> Path:
    """Create a seed of cloud-init (NoCloud) with a host name. Return the path of the ISO image."""
    if shutil.which("genisoimage") is None:
        pytest.skip("no genisoimage in PATH (`make system` as root installs it)")
    (contents := folder / name).mkdir()
    (contents / "meta-data").write_text(f"instance-id: {name}\nlocal-hostname: {name}\n")
    (contents / "user-data").write_text("#cloud-config\n")
    made, target = ["genisoimage", "-quiet", "-volid", "cidata", "-rock"], folder / f"{name}.iso"
    subprocess.run([*made, "-output", target, contents], check=True)
    return target


def test_restored_guests_read_the_seeds_that_are_inserted_into_their_drives(
    guests: ShellGuests, image: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        names = ("one", "two")
        for name in names:
            seed(tmp_path, name)
        async with (
            restored("one", image, guests.command(*NAMES)),
            restored("two", image, guests.command(*NAMES)),
        ):
            for name in names:
                assert await pageferry.monitor_async(name, f"change seed {tmp_path}/{name}.iso raw read-only") == ""
                said = await guests.ask(
                    name,
                    "until mount -t iso9660 -o ro /dev/sr0 /mnt 2>/dev/null; do sleep 0.1; done; cat /mnt/meta-data",
                )
                assert said == [f"instance-id: {name} local-hostname: {name}"]

    asyncio.run(run())


def test_seed_in_the_command_line_of_a_restored_guest_is_refused(
    guests: ShellGuests, image: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        path = seed(tmp_path, "other")
        command = [word.replace("if=none,id=seed", f"if=none,id=seed,file={path},format=raw") for word in NAMES]
        with pytest.raises(DisksDiffer):
            await restore_guest("other", image, guests.command(*command))

    asyncio.run(run())


def test_clones_can_have_chosen_generation_ids(guests: ShellGuests, image: Path) -> None:
    chosen = "11111111-2222-3333-4444-00000000000{}"

    async def guid_of(name: str) -> str:
        return str((await ask(name, "query-vm-generation-id"))["guid"])

    async def run() -> None:
        command = guests.command(*NAMES, "-set", f"device.generation.guid={chosen.format('{n}')}")
        result = await pageferry.clone_async(image, command, count=2, name="shell-{n}")
        found = [await guid_of(clone.name) for clone in result.clones]
        assert found == [chosen.format(1), chosen.format(2)]
        async with restored("third", image, guests.command(*NAMES), memory="shared", guid=chosen.format(3)):
            assert await guid_of("third") == chosen.format(3)
        for clone in result.clones:
            await pageferry.stop_async(clone.name)

    asyncio.run(run())
