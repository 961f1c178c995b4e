"""Adoption of QEMU processes that another program has started."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pageferry.errors import UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from pageferry.memory.regions import Region
from pageferry.workloads.qemu import ram as qemu_ram
from pageferry.workloads.qemu import unsupported
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts

TIMEOUT = 60.0
MIB = 1 << 20


def pageferry(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "pageferry", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def listed() -> list[dict[str, Any]]:
    return [json.loads(line) for line in pageferry("list", "--output", "json").stdout.splitlines()]


@pytest.fixture
def ram() -> Iterator[Path]:
    """Yield a temporary directory on tmpfs, for files with guest memory."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


async def answers(qmp: str) -> None:
    """Wait until QEMU replies on its monitor. Before it replies, QEMU creates the machine and maps its memory."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            async with await Monitor.open(qmp) as monitor:
                await monitor.execute("query-status")
            return
        except WorkloadDied:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


@pytest.fixture
def foreign(parts: GuestParts, tmp_path: Path) -> Iterator[Any]:
    """Yield a function that starts QEMU processes without pageferry, and kill these processes after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str, wrapper: Sequence[str] = ()) -> str:
        path = str(tmp_path / f"{len(started)}.sock")
        command = [*wrapper, *parts.bare(*options, "-qmp", f"unix:{path},server=on,wait=off")]
        started.append(subprocess.Popen(command))
        asyncio.run(answers(path))
        return path

    yield start
    for process in started:
        process.kill()
        process.wait()


def backend(name: str, path: Path, *more: str, size: str = "64M") -> str:
    return ",".join([f"memory-backend-file,id={name},size={size},mem-path={path},share=on", *more])


@pytest.mark.oldest_qemu
def test_adopted_guest_can_be_paused_saved_and_resumed(foreign: Any, registry: Registry, ram: Path) -> None:
    memory = backend("ram0", ram / "ram", "align=2M")
    qmp = foreign("-m", "64M", "-object", memory, "-machine", "memory-backend=ram0")
    assert pageferry("adopt", "theirs", "--qmp", qmp).returncode == 0
    assert [one["name"] for one in listed()] == ["theirs"]

    async def scenario() -> None:
        guest = await QemuWorkload.attach("theirs")
        (region,) = guest.regions
        assert (region.name, region.length) == ("ram0", 64 << 20)
        assert os.path.samestat(os.fstat(region.fd), os.stat(ram / "ram"))
        await guest.pause()
        assert await guest.save_state()
        await guest.resume()
        assert await guest.running()
        await guest.discard()

    asyncio.run(scenario())
    assert listed() == []


def test_adopted_numa_guest_has_a_region_for_each_node(foreign: Any, registry: Registry, ram: Path) -> None:
    """The path of one backend is a file. That of the other is a directory, in which QEMU creates an unlinked file."""
    (ram / "folder").mkdir()
    nodes = [backend("n0", ram / "ram", "align=2M"), backend("n1", ram / "folder", "align=2M")]
    options = [
        word for number, node in enumerate(nodes) for word in ("-object", node, "-numa", f"node,memdev=n{number}")
    ]
    qmp = foreign("-m", "128M", *options)

    async def scenario() -> None:
        guest = await QemuWorkload.adopt("theirs", qmp)
        assert sorted((region.name, region.length) for region in guest.regions) == [("n0", 64 << 20), ("n1", 64 << 20)]
        assert len({os.fstat(region.fd).st_ino for region in guest.regions}) == 2
        await guest.discard()

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["none", "private"])
def test_adoption_of_guest_with_private_memory_is_refused(foreign: Any, registry: Registry, kind: str) -> None:
    private = ("-object", "memory-backend-ram,id=m,size=64M", "-machine", "memory-backend=m")
    options = private if kind == "private" else ()
    qmp = foreign("-m", "64M", *options)
    with pytest.raises(UnsupportedError, match="memory-backend-file,id=ram0,size=SIZE,share=on,align=2M"):
        asyncio.run(QemuWorkload.adopt("theirs", qmp))
    assert not (registry.path / "theirs").exists()


def test_misaligned_memory_is_adopted_with_a_warning(
    foreign: Any, registry: Registry, ram: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = backend("ram0", ram / "ram", size="66M")
    qmp = foreign("-m", "66M", "-object", memory, "-machine", "memory-backend=ram0")

    async def scenario() -> bool:
        guest = await QemuWorkload.adopt("theirs", qmp)
        misaligned = qemu_ram.misaligned(guest.regions[0])
        await guest.discard()
        return misaligned

    assert asyncio.run(scenario()) == any("align=2M" in record.message for record in caplog.records)


def test_adoption_without_a_monitor_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no QEMU listens on"):
        asyncio.run(QemuWorkload.adopt("theirs", str(tmp_path / "nothing")))
    assert not (registry.path / "theirs").exists()


def numa(*backends: str) -> list[str]:
    """Return QEMU options for one NUMA node per backend. The backends are named m0, m1, and so on."""
    nodes = [("-object", one, "-numa", f"node,memdev=m{number}") for number, one in enumerate(backends)]
    return [word for node in nodes for word in node]


def adopted(qmp: str) -> tuple[tuple[Region, ...], dict[str, bytes]]:
    """Adopt and discard a guest. Return its regions, and the paths of their mappings by region name."""

    async def scenario() -> tuple[tuple[Region, ...], dict[str, bytes]]:
        guest = await QemuWorkload.adopt("theirs", qmp)
        regions = guest.regions
        places = {one.segments[0].address: one.name for one in regions}
        mapped = [one for one in proc.file_mappings(guest.pid) if one.address in places]
        inodes = {one.name: os.fstat(one.fd).st_ino for one in regions}
        assert inodes == {places[one.address]: one.inode for one in mapped}
        paths = {places[one.address]: os.fsencode(one.path) for one in mapped}
        await guest.discard()
        return regions, paths

    return asyncio.run(scenario())


@pytest.mark.oldest_qemu
def test_backends_in_the_same_directory_are_distinguished(foreign: Any, registry: Registry, ram: Path) -> None:
    regions, paths = adopted(foreign("-m", "128M", *numa(backend("m0", ram), backend("m1", ram))))
    assert {one.name: one.length for one in regions} == {"m0": 64 * MIB, "m1": 64 * MIB}
    for name, path in paths.items():
        assert f"/qemu_back_mem.{name}.".encode() in path


def _check_restored(parts: GuestParts, ram: Path, options: Sequence[str]) -> None:
    """Restore the image into a guest with these options, and check that each node has its own contents."""
    command = parts.bare("-m", "128M", "-S", *options)
    restored = pageferry("restore", "again", str(ram / "image"), "--detach", "--", *command)
    assert restored.returncode == 0, restored.stderr
    deadline = time.monotonic() + TIMEOUT
    while listed()[0]["deferred"]:
        assert time.monotonic() < deadline

    async def contents() -> dict[str, bytes]:
        guest = await QemuWorkload.attach("again")
        found = {region.name: os.pread(region.fd, 6, 8 * MIB) for region in guest.regions}
        await guest.discard()
        return found

    assert asyncio.run(contents()) == {"m0": bytes(6), "m1": b"node 1"}


def test_checkpoint_of_backends_in_the_same_directory_contains_both(
    foreign: Any, registry: Registry, ram: Path, parts: GuestParts
) -> None:
    """The image does not record the pages of one node as duplicates of pages of the other node."""
    qmp = foreign("-m", "128M", "-S", *numa(backend("m0", ram), backend("m1", ram)))
    assert pageferry("adopt", "theirs", "--qmp", qmp).returncode == 0
    (pid,) = [one["pid"] for one in listed()]
    for mapping in proc.file_mappings(pid):
        if b"qemu_back_mem.m1." in os.fsencode(mapping.path):
            descriptor = proc.open_mapped_file(pid, mapping)
            os.pwrite(descriptor, b"node 1" * 1000, 8 * MIB)
            os.close(descriptor)
    saved = pageferry("checkpoint", "theirs", str(ram / "image"))
    assert saved.returncode == 0, saved.stderr
    info = json.loads(pageferry("image", "info", str(ram / "image"), "--output", "json").stdout)
    assert pageferry("stop", "theirs").returncode == 0
    _check_restored(parts, ram, numa(backend("m0", ram), backend("m1", ram)))
    pages = {one["name"]: one["pages"] for one in info["regions"]}
    assert (pages["m0"]["data"], pages["m0"]["same-as"], pages["m1"]["data"]) == (0, 0, 2)


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("offsets", [(0, 64 * MIB), (64 * MIB, 0), (2 * MIB, 128 * MIB)])
def test_backends_in_one_file_are_distinguished_by_offset(
    foreign: Any, registry: Registry, ram: Path, qemu: Path, offsets: tuple[int, int]
) -> None:
    if b"offset=<" not in subprocess.check_output([qemu, "-object", "memory-backend-file,help"]):
        pytest.skip("this QEMU has no offset= for memory-backend-file")
    (ram / "ram").touch()
    os.truncate(ram / "ram", 192 * MIB)
    backends = [backend(f"m{number}", ram / "ram", f"offset={offset}") for number, offset in enumerate(offsets)]
    regions, _ = adopted(foreign("-m", "128M", *numa(*backends)))
    assert {one.name: (one.file_offset, one.length) for one in regions} == {
        f"m{number}": (offset, 64 * MIB) for number, offset in enumerate(offsets)
    }
    assert all(sum(segment.length for segment in one.segments) == one.length for one in regions)


@pytest.mark.oldest_qemu
def test_backends_with_the_same_range_of_a_file_are_refused(foreign: Any, registry: Registry, ram: Path) -> None:
    qmp = foreign("-m", "128M", *numa(backend("m0", ram / "ram"), backend("m1", ram / "ram")))
    with pytest.raises(UnsupportedError, match="backends m0 and m1 use the same bytes of one file"):
        asyncio.run(QemuWorkload.adopt("theirs", qmp))


def test_backend_whose_file_was_replaced_is_found_by_its_original_path(
    foreign: Any, registry: Registry, ram: Path
) -> None:
    qmp = foreign("-m", "64M", "-object", backend("m0", ram / "ram"), "-machine", "memory-backend=m0")
    (ram / "ram").unlink()
    (ram / "ram").touch()
    regions, paths = adopted(qmp)
    assert paths == {"m0": os.fsencode(ram / "ram (deleted)")}
    assert [one.length for one in regions] == [64 * MIB]


def test_backend_whose_removed_file_is_ambiguous_is_refused(foreign: Any, registry: Registry, ram: Path) -> None:
    """The kernel reports the same path for a removed file `ram` and for an existing file `ram (deleted)`."""
    backends = backend("m0", ram / "ram"), backend("m1", ram / "ram (deleted)")
    qmp = foreign("-m", "128M", *numa(*backends))
    (ram / "ram").unlink()
    with pytest.raises(UnsupportedError, match=r"cannot determine which of several mapped files .* in backend m0"):
        asyncio.run(QemuWorkload.adopt("theirs", qmp))


def test_memory_on_a_disk_is_refused_with_the_setting_to_change(
    foreign: Any, registry: Registry, tmp_path: Path
) -> None:
    kind = subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True).strip()
    if kind == "tmpfs":
        pytest.skip("the temporary directory of the test is on tmpfs")
    qmp = foreign("-m", "64M", "-object", backend("ram0", tmp_path / "ram"), "-machine", "memory-backend=ram0")
    with pytest.raises(UnsupportedError, match=r"it is on .*must be on tmpfs or hugetlbfs.*memory_backing_dir"):
        asyncio.run(QemuWorkload.adopt("theirs", qmp))
    assert not (registry.path / "theirs").exists()


def test_hotplugged_memory_is_refused_at_the_next_pause(foreign: Any, registry: Registry, ram: Path) -> None:
    memory = backend("ram0", ram / "ram", "align=2M")
    qmp = foreign("-m", "64M,slots=1,maxmem=192M", "-object", memory, "-machine", "memory-backend=ram0")

    async def scenario() -> None:
        guest = await QemuWorkload.adopt("theirs", qmp)
        await guest.prepare_pause()
        guest.close()
        async with await Monitor.open(qmp) as monitor:
            await monitor.execute("object-add", qom_type="memory-backend-ram", id="more", size=128 * MIB)
            await monitor.execute("device_add", driver="pc-dimm", memdev="more", id="dimm")
        with pytest.raises(UnsupportedError, match="pc-dimm: hotplugged memory is not managed"):
            await guest.prepare_pause()
        guest.close()
        with pytest.raises(UnsupportedError, match="hotplugged memory is not managed"):
            await QemuWorkload.attach("theirs")
        registry.remove("theirs")

    asyncio.run(scenario())


def test_guest_with_the_memory_file_of_another_guest_is_refused(
    foreign: Any, registry: Registry, ram: Path, parts: GuestParts
) -> None:
    """The file of a running guest is not changed."""
    memory = ("-m", "64M", "-object", backend("ram0", ram / "ram", "align=2M"), "-machine", "memory-backend=ram0")
    foreign("-S", *memory)
    with open(ram / "ram", "r+b") as file:
        file.write(b"guest")
    done = pageferry("run", "mine", "--detach", "--", *parts.bare(*memory))
    assert done.returncode == WorkloadError.exit_code
    assert f"maps {ram / 'ram'} for writing" in done.stderr
    assert (ram / "ram").read_bytes()[:5] == b"guest"


@pytest.mark.usefixtures("root")
def test_guest_in_another_pid_namespace_can_be_saved(foreign: Any, registry: Registry, ram: Path) -> None:
    memory = backend("ram0", ram / "ram", "align=2M")
    options = ("-m", "64M", "-object", memory, "-machine", "memory-backend=ram0", "-smp", "2")
    qmp = foreign(*options, wrapper=("unshare", "--pid", "--mount-proc", "--fork", "--kill-child"))

    async def scenario() -> None:
        guest = await QemuWorkload.adopt("theirs", qmp)
        assert proc.status(guest.pid)[b"NSpid"] == [str(guest.pid).encode(), b"1"]
        assert guest.faults().minor > 0
        guest.close()
        saved = await asyncio.to_thread(pageferry, "checkpoint", "theirs", str(ram / "image"))
        assert saved.returncode == 0, saved.stderr
        guest = await QemuWorkload.attach("theirs")
        await guest.pause()
        assert await guest.save_state()
        await guest.resume()
        await guest.discard()

    asyncio.run(scenario())


def test_unsupported_devices_added_after_adoption_are_refused_at_the_next_pause(
    foreign: Any, registry: Registry, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The QEMU under test may lack the devices that pageferry refuses. The test adds available devices to the list."""
    memory = backend("ram0", ram / "ram", "align=2M")
    qmp = foreign("-m", "64M", "-object", memory, "-machine", "memory-backend=ram0", "-netdev", "user,id=n")

    async def refused(kinds: dict[str, str], name: str) -> None:
        guest = await QemuWorkload.attach("theirs")
        with monkeypatch.context() as patch:
            patch.setitem(kinds, name, "test")
            with pytest.raises(UnsupportedError, match=f"{name}: test"):
                await guest.prepare_pause()
        guest.close()

    async def scenario() -> None:
        (await QemuWorkload.adopt("theirs", qmp)).close()
        await refused(unsupported.NETWORKS, "user")
        async with await Monitor.open(qmp) as monitor:
            await monitor.execute("blockdev-add", driver="null-co", node_name="disk")
            await monitor.execute("object-add", qom_type="rng-random", id="rng")
            await monitor.execute("device_add", driver="virtio-rng-pci", rng="rng", id="device")
        await refused(unsupported.BLOCK_DRIVERS, "null-co")
        await refused(unsupported.OBJECTS, "rng-random")
        await refused(unsupported.DEVICES, "virtio-rng-pci")
        guest = await QemuWorkload.attach("theirs")
        await guest.pause()
        await guest.resume()
        assert await guest.running()
        await guest.discard()

    asyncio.run(scenario())
