"""Test that a migration into a file system smaller than the guest's memory is refused before the commit."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller
from tests.kernel import moving

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Yield the directory of a tmpfs of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


class Filed(Traveller):
    """Guest whose memory is in a file that the test chooses."""

    def in_file(self, path: Path, name: str) -> list[str]:
        backend = f"memory-backend-file,id=ram,size=64M,share=on,align=2M,mem-path={path}"
        return [*super().command(name), "-object", backend, "-machine", "memory-backend=ram"]

    def command(self, name: str) -> list[str]:
        return self.in_file(Path(f"/dev/shm/pageferry-{self.folder.name}-{name}"), name)


def test_postcopy_into_a_too_small_file_system_is_refused(
    payload_on_tcg: GuestParts, tmp_path: Path, small: Path
) -> None:
    guest = Filed(payload_on_tcg, tmp_path, memory="64M", checker="ferry.mib=32")
    files = [Path(f"/dev/shm/pageferry-{tmp_path.name}-{name}") for name in (guest.name, guest.next_name)]
    try:
        guest.start()
        command = guest.in_file(small / "ram", guest.next_name)
        with guest.receiver("--output", "json", command=command, stderr=subprocess.PIPE) as there:
            with guest.migrating(moving.address_of(there), "--mode", "postcopy", stderr=subprocess.PIPE) as migration:
                assert migration.process.stderr is not None
                said = migration.process.stderr.read().decode()
                assert migration.wait() == 21, said
                migration.process.stderr.close()
            there.wait()
            assert there.process.stderr is not None
            there.process.stderr.close()
        assert "of free space" in said
        guest.verifies_everything()
        guest.untouched()
    finally:
        guest.end()
        for file in files:
            file.unlink(missing_ok=True)
