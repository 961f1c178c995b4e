"""Real programs and many kinds of devices in a guest that is migrated, checkpointed and restored under load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CACHE
from tests.guest import debian, zoo
from tests.guest.debian import DebianGuest
from tests.guest.machines import GuestParts
from tests.guest.zoo import Zoo

pytestmark = [pytest.mark.usefixtures("root", "registry"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def parts(real_qemu: Path) -> GuestParts:
    """Return the QEMU and the kernel of the guests of this module. The kernel is that of the Debian guest."""
    if (lacking := zoo.missing(CACHE) or debian.missing()) is not None:
        pytest.skip(f"{lacking} is missing (`make system` installs or fetches it, on Debian for amd64)")
    return GuestParts(real_qemu, CACHE / "debian/vmlinuz")


@pytest.fixture
def guest(parts: GuestParts, tmp_path: Path) -> DebianGuest:
    return DebianGuest(parts, tmp_path, CACHE)


@pytest.fixture
def animals(parts: GuestParts, tmp_path: Path) -> Iterator[Zoo]:
    """Yield a zoo that has not been started."""
    made = Zoo(parts, tmp_path, CACHE)
    yield made
    made.close()


@pytest.fixture
def guest_image(guest: DebianGuest, states: Path) -> Path:
    return debian.saved(guest, states)


@pytest.fixture
def zoo_image(animals: Zoo, states: Path) -> Path:
    return debian.saved(animals, states)


@pytest.mark.only_full
def test_zoo_keeps_the_state_of_all_devices_in_restore_and_migrations(animals: Zoo, zoo_image: Path) -> None:
    with debian.running(animals, zoo_image) as guest:
        work = guest.verdict()
        for mode in ("precopy", "postcopy"):
            assert guest.move("--mode", mode)["status"] == "completed"
            work = guest.works(work)
        guest.finish()


@pytest.mark.only_full
@pytest.mark.parametrize("tpm", ["tpm-crb", "tpm-tis"])
def test_zoo_keeps_the_state_of_all_devices_in_a_checkpoint_under_load(
    animals: Zoo, tmp_path: Path, zoo_image: Path, states: Path, tpm: str
) -> None:
    animals.tpm = tpm
    if tpm != "tpm-crb":
        zoo_image = debian.saved(animals, states / tpm)
    with debian.running(animals, zoo_image, eager=True) as guest:
        work = guest.verdict()
        guest.save(tmp_path, paused=False)
        work = guest.works(work)
        (later := tmp_path / "later").mkdir()
        guest.save(later, mode="stop")
        work = guest.works(work)
        guest.end()
        guest.restore(later)
        guest.works(work)
        guest.finish()


@pytest.mark.only_full
@pytest.mark.parametrize("mode", ["precopy", "postcopy", "hybrid"])
def test_programs_keep_their_state_on_disk_and_in_memory_in_migrations(
    guest: DebianGuest, guest_image: Path, mode: str
) -> None:
    with debian.running(guest, guest_image):
        work = guest.verdict()
        assert guest.move("--mode", mode)["status"] == "completed"
        guest.works(work)
        guest.finish()


@pytest.mark.only_full
@pytest.mark.parametrize("mode", ["lazy", "stop"])
def test_programs_keep_their_state_on_disk_and_in_memory_in_checkpoints(
    guest: DebianGuest, guest_image: Path, tmp_path: Path, mode: str
) -> None:
    """The restored guest has the disks of the checkpoint. Its programs continue from that state."""
    with debian.running(guest, guest_image):
        work = guest.verdict()
        (saved := tmp_path / "saved").mkdir()
        guest.save(saved, mode=mode)
        guest.works(work)
        guest.end()
        guest.restore(saved)
        guest.works(work)
        guest.finish()
