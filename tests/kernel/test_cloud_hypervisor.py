"""VMs of Cloud Hypervisor that are saved and restored by local migrations, with a fake of Cloud Hypervisor's side."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import pageferry
from pageferry.cli import offload_daemon
from pageferry.errors import PageferryError, RestoreError, UnsupportedError, UsageError, WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.images.image import ImageFile
from pageferry.pager.cloud_hypervisor.slots import SavedVm
from pageferry.workloads.cloud_hypervisor.api import Api
from tests.hugetlb import reserved
from tests.kernel import fake_cloud_hypervisor
from tests.kernel.fake_cloud_hypervisor import (
    COMPLETE,
    CONFIG,
    GIANT,
    HUGE,
    MEMORY_FD,
    PAGE,
    START,
    STATE,
    STATE_PAYLOAD,
    Behaviour,
    config,
    header,
    page_fault,
)
from tests.kernel.programs import DEADLINE, Program, wait_until

pytestmark = pytest.mark.usefixtures("root")

MIB = 1 << 20
SLOTS = [(0, 0, 12 * MIB, 0), (1, 4 << 30, 4 * MIB, 12 * MIB)]
"""Two slots of one file, as of a VM whose memory continues above 4 GiB."""
SIZE = 16 * MIB
FAILED = RestoreError.exit_code


class CloudHypervisor(Program):
    """Fake Cloud Hypervisor."""

    def __init__(self, folder: Path, slots: Any = SLOTS, *, name: str = "api", **chosen: Any) -> None:
        self.api = folder / name
        behaviour = Behaviour(**{key: chosen.pop(key) for key in [*chosen] if key in Behaviour.__dataclass_fields__})
        super().__init__(
            fake_cloud_hypervisor.__file__,
            fake_cloud_hypervisor.settings(str(self.api), slots, behaviour=behaviour, **{"contents": b"page"} | chosen),
        )
        assert self.json() == {"ready": True}
        self.refused: list[str] = []
        self._receiving: threading.Thread | None = None

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Execute a command, and return its result."""
        self.say(json.dumps({"what": what, **arguments}))
        found: dict[str, Any] = self.json()
        return found

    def receive(self, path: Path, **options: Any) -> None:
        """Wait for a migration in a thread."""
        self._receiving = threading.Thread(target=self._receive, args=({"receiver_url": f"unix:{path}", **options},))
        self._receiving.start()

    def _receive(self, request: dict[str, Any]) -> None:
        try:
            Api(self.api).put("vm.receive-migration", request)
        except PageferryError as refused:
            self.refused.append(str(refused))

    def received(self) -> None:
        """Wait until the migration has ended, and check that it has succeeded."""
        assert self._receiving is not None
        self._receiving.join(DEADLINE)
        assert self.refused == []

    def kill(self) -> None:
        """Kill the program."""
        super().kill()
        if self._receiving is not None:
            self._receiving.join(DEADLINE)


class Pager(Program):
    """`pageferry serve` for a VM."""

    def __init__(self, image: Path, path: Path, *options: str) -> None:
        words = ("-m", "pageferry", "serve", str(image), "--cloud-hypervisor", str(path), *options, "--output", "json")
        self._errors = path.with_name("errors")
        with self._errors.open("wb") as errors:
            super().__init__(*words, stderr=errors)
        assert self.event("serving")["socket"] == str(path)

    def event(self, kind: str) -> dict[str, Any]:
        """Return the next event, which must be of this type."""
        found: dict[str, Any] = self.json()
        assert found["type"] == kind, found
        return found

    def end(self, code: int = 0) -> dict[str, Any]:
        """Wait for the result and the exit."""
        result = self.event("serve")
        assert self.wait() == code
        return result

    def error(self) -> str:
        """Wait for the exit, and return the standard error."""
        self.wait()
        return self._errors.read_text()


def digest_of(image: Path) -> str:
    """Return the digest of the memory in an image."""
    file = ImageFile(image)
    contents: bytes = file.read(0, file.pages)
    return hashlib.sha256(contents).hexdigest()


def swept(image: Path) -> str:
    """Return the digest that `sweep` returns for the memory of an image."""
    file = ImageFile(image)
    contents: bytes = file.read(0, file.pages)
    pages = (contents[at : at + PAGE] for at in range(0, len(contents), PAGE))
    return hashlib.sha256(b"".join(hashlib.sha256(page).digest() for page in pages)).hexdigest()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the image of a VM."""
    folder = tmp_path_factory.mktemp("vm")
    with CloudHypervisor(folder) as vmm:
        pageferry.checkpoint_cloud_hypervisor(vmm.api, folder / "image")
        assert vmm.wait() == 0
    return folder / "image"


@contextmanager
def restored(image: Path, folder: Path, *options: str, **chosen: Any) -> Iterator[tuple[Pager, CloudHypervisor]]:
    """Restore a VM on demand."""
    with CloudHypervisor(folder, [], **chosen) as vmm:
        vmm.receive(folder / "sock", memory_mode="Postcopy")
        with Pager(image, folder / "sock", "--on-demand", *options) as pager:
            yield pager, vmm


def _check_descriptors(before: set[str]) -> None:
    """Check that no descriptors are left. An error refers to its frames, and a thread may be ending."""
    wait_until(lambda: gc.collect() >= 0 and not set(os.listdir("/proc/self/fd")) - before, "closed descriptors")


# -- checkpoints


def test_fake_sends_the_recorded_messages() -> None:
    assert header(START).hex() == "01000000000000000000000000000000"
    assert header(MEMORY_FD, 4).hex() == "07000000000000000400000000000000"
    assert header(CONFIG, 7571).hex() == "0200000000000000931d000000000000"
    assert header(STATE, 32026).hex() == "03000000000000001a7d000000000000"
    assert header(COMPLETE).hex() == "05000000000000000000000000000000"
    assert page_fault(0, PAGE).hex() == "0900000000000000100000000000000000000000000000000010000000000000"


@pytest.mark.parametrize("mode", ["lazy", "stop"])
def test_checkpoint_of_a_running_vm_is_that_of_the_pause(tmp_path: Path, mode: Any) -> None:
    with CloudHypervisor(tmp_path) as vmm:
        vmm.ask("churn", seed=1)
        wait_until(lambda: vmm.ask("digest")["writes"] > 100, "writes")
        result = pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image", preserve_source=True, mode=mode)
        after = vmm.ask("digest")
        assert not after["paused"]
        wait_until(lambda: vmm.ask("digest")["writes"] > after["writes"], "writes after the checkpoint")
        assert digest_of(tmp_path / "image") == after["at_pause"]
        assert after["digest"] != after["at_pause"]
        assert vmm.ask("state")["log"] == []
    assert ImageFile(tmp_path / "image").verify() == []
    assert result.mode == mode
    info = pageferry.image_info(tmp_path / "image")
    assert info.kind == "cloud-hypervisor"
    assert [(region.name, region.length) for region in info.regions] == [("slot0", 12 * MIB), ("slot1", 4 * MIB)]


def test_checkpoint_stores_the_payloads_unchanged(image: Path) -> None:
    saved = msgspec.msgpack.decode(ImageFile(image).state(), type=SavedVm)
    assert (saved.version, saved.config, saved.state) == (1, config(SLOTS), STATE_PAYLOAD)


def test_paused_vm_stays_paused(tmp_path: Path) -> None:
    with CloudHypervisor(tmp_path) as vmm:
        Api(vmm.api).put("vm.pause")
        pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image", preserve_source=True)
        found = vmm.ask("digest")
        assert found["paused"]
        assert digest_of(tmp_path / "image") == found["digest"]
        Api(vmm.api).put("vm.resume")


def test_child_contains_only_changed_pages(tmp_path: Path) -> None:
    with CloudHypervisor(tmp_path) as vmm:
        pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image", preserve_source=True)
        vmm.ask("write", position=5 * PAGE, contents=b"changed".hex())
        child = pageferry.checkpoint_cloud_hypervisor(
            vmm.api, tmp_path / "child", preserve_source=True, parent=tmp_path / "image"
        )
        assert child.pages.data == 1
        assert digest_of(tmp_path / "child") == vmm.ask("digest")["digest"]


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"cut": 0}, "ended the migration"),
        ({"cut": 5}, "ended within a request"),
        ({"cut": 34}, "payload of MEMORY_FD"),
        ({"cut": 100}, "payload of CONFIG"),
        ({"end_after": START}, "ended the migration"),
        ({"end_after": CONFIG}, "ended the migration"),
        ({"end_after": STATE}, "ended the migration"),
        ({"headers": {str(START): header(START)[:2].hex() + "0100" + "00" * 12}}, "unsupported version 1"),
        ({"headers": {str(START): header(99).hex()}}, "unknown command 99"),
        ({"headers": {str(MEMORY_FD): header(MEMORY_FD, 8).hex()}}, "payload of 8 bytes"),
        ({"headers": {str(CONFIG): header(CONFIG, 1 << 60).hex()}}, "payload of"),
        ({"headers": {str(STATE): header(STATE, (256 << 20) + 1).hex()}}, "payload of"),
        ({"headers": {str(COMPLETE): header(CONFIG).hex()}}, "unexpected command CONFIG"),
        ({"files": 0}, "0 descriptors"),
        ({"files": 2}, "2 descriptors"),
        ({"shorten": 2 * MIB}, "bytes, expected"),
        ({"repeat": True}, "sent twice"),
        ({"config": "[]"}, "invalid configuration"),
        ({"config": config([(0, 0, SIZE, 0), (1, MIB, SIZE, 0)]).decode()}, "two of them contain address"),
        ({"config": config([(0, 0, 12 * MIB, 0), (7, 4 << 30, MIB, 0)]).decode()}, "slot 7 was not sent"),
        ({"config": config([(0, 1, 12 * MIB, 0)]).decode()}, "not a multiple"),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else "",
)
def test_broken_migration_writes_no_image_and_the_vm_runs(tmp_path: Path, behaviour: Any, words: str) -> None:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    with CloudHypervisor(tmp_path, **behaviour) as vmm:
        with pytest.raises(WorkloadError, match=words):
            pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image", preserve_source=True)
        wait_until(lambda: vmm.ask("state")["log"] or not vmm.ask("digest")["paused"], "the end of the migration")
        wait_until(lambda: not vmm.ask("digest")["paused"], "the resumed VM")
    assert not (tmp_path / "image").exists()
    _check_descriptors(before)


def test_vm_that_cannot_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    with CloudHypervisor(tmp_path, shared=False) as vmm, pytest.raises(UnsupportedError, match="--memory shared=on"):
        pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image")
    with CloudHypervisor(tmp_path, name="old", version="53.0", preserves=False) as vmm:
        with pytest.raises(UnsupportedError, match="preserve_source"):
            pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image", preserve_source=True)
        assert not vmm.ask("digest")["paused"]
        with pytest.raises(UsageError, match="track"):
            pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image", track=True)
    with pytest.raises(WorkloadDied, match="API socket"):
        pageferry.checkpoint_cloud_hypervisor(tmp_path / "none", tmp_path / "image")


def test_failed_image_leaves_the_vm_running_without_preserve_source(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with CloudHypervisor(tmp_path) as vmm:
        with pytest.raises(UsageError, match="is a directory"):
            pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "folder")
        with pytest.raises(PageferryError, match="create its directory"):
            pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "absent" / "image")
        wait_until(lambda: not vmm.ask("digest")["paused"], "the resumed VM")
        pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image")
        assert vmm.wait() == 0


def test_killed_command_leaves_the_vm_running(tmp_path: Path) -> None:
    with CloudHypervisor(tmp_path) as vmm:
        vmm.ask("churn", seed=1)
        words = ("checkpoint", "--cloud-hypervisor", str(vmm.api), str(tmp_path / "image"), "--preserve-source")
        with Program("-m", "pageferry", *words, "--bandwidth", "1M", "--output", "json") as saver:
            while saver.json()["type"] != "snapshot-point":  # the VM runs again
                pass
            saver.kill()
        before = vmm.ask("digest")
        assert not before["paused"]
        wait_until(lambda: vmm.ask("digest")["writes"] > before["writes"], "writes")
    assert not (tmp_path / "image").exists()


# -- restores


@pytest.mark.parametrize("options", [[], ["--on-demand"], ["--on-demand", "--no-prefetch"], ["--on-demand", "--eager"]])
def test_restored_memory_and_state_are_those_of_the_image(image: Path, tmp_path: Path, options: list[str]) -> None:
    mode = {"memory_mode": "Postcopy"} if options else {}
    with CloudHypervisor(tmp_path, []) as vmm:
        vmm.receive(tmp_path / "sock", **mode)
        with Pager(image, tmp_path / "sock", *options) as pager:
            connected = pager.event("microvm-connected")
            assert (connected["microvm"], connected["mappings"]) == (vmm.process.pid, 2)
            ended = pager.event("microvm-ended")
            assert (ended["end"], ended["deferred"]) == ("loaded", 0)
            assert pager.end()["loaded"] == 1
        vmm.received()
        state = vmm.ask("state")
        assert state["config"].encode() == config(SLOTS)
        assert bytes.fromhex(state["state"]) == STATE_PAYLOAD
        pages = [[slot[1] + at, PAGE] for slot in SLOTS for at in range(0, slot[2], PAGE)]
        assert state["requests"] == (pages if options else [])
        assert vmm.ask("digest") == {"digest": digest_of(image), "at_pause": "", "paused": False, "writes": 0}


def test_guest_that_runs_on_demand_reads_the_contents_of_the_image(image: Path, tmp_path: Path) -> None:
    order = (np.random.default_rng(1).permutation(SIZE // PAGE).astype(int) * PAGE).tolist()
    with restored(image, tmp_path, "--no-prefetch", no_prefault=True) as (pager, vmm):
        assert pager.event("microvm-connected")["deferred"] > 10 * MIB
        vmm.received()
        assert vmm.ask("sweep", order=order)["digest"] == swept(image)
        assert pager.event("microvm-ended")["missed"] > 0
        assert pager.end()["loaded"] == 1
        assert [pair[0] for pair in vmm.ask("state")["requests"]] == [0, *_addresses(order)]


def _addresses(order: list[int]) -> list[int]:
    found = [at if at < SLOTS[0][2] else at - SLOTS[0][2] + SLOTS[1][1] for at in order]
    return [address for address in found if address]  # page 0 was requested first


def test_restored_vm_is_saved_again(image: Path, tmp_path: Path) -> None:
    with restored(image, tmp_path) as (pager, vmm):
        pager.event("microvm-connected")
        pager.event("microvm-ended")
        pager.end()
        vmm.received()
        vmm.ask("churn", seed=2)
        pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "again", preserve_source=True)
        assert digest_of(tmp_path / "again") == vmm.ask("digest")["at_pause"]


def test_vm_can_be_left_paused(image: Path, tmp_path: Path) -> None:
    with restored(image, tmp_path, "--paused") as (pager, vmm):
        pager.event("microvm-connected")
        pager.event("microvm-ended")
        pager.end()
        vmm.received()
        assert vmm.ask("digest")["paused"]


@pytest.mark.parametrize("length", [HUGE, 4 * MIB])
def test_requests_for_huge_pages_are_answered(image: Path, tmp_path: Path, length: int) -> None:
    with restored(image, tmp_path, request=length) as (pager, vmm):
        pager.event("microvm-connected")
        assert pager.event("microvm-ended")["faults"] == SIZE // length
        pager.end()
        vmm.received()
        assert vmm.ask("digest")["digest"] == digest_of(image)


@pytest.mark.only_full
def test_request_for_a_gigabyte_is_answered(tmp_path: Path) -> None:
    with CloudHypervisor(tmp_path, [(0, 0, GIANT, 0)], contents=b"") as vmm:
        vmm.ask("write", position=GIANT - PAGE, contents=b"last".hex())
        pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image")
    with restored(tmp_path / "image", tmp_path, name="other", request=GIANT) as (pager, vmm):
        pager.event("microvm-connected")
        assert pager.event("microvm-ended")["faults"] == 1
        pager.end()
        vmm.received()
        expected = [hashlib.sha256(words.ljust(PAGE, b"\0")).digest() for words in (b"", b"last")]
        found = vmm.ask("sweep", order=[0, GIANT - PAGE])["digest"]
        assert found == hashlib.sha256(b"".join(expected)).hexdigest()


def test_memory_of_hugetlbfs_is_restored_to_hugetlbfs(tmp_path: Path) -> None:
    slots = [(0, 0, 8 * MIB, 0)]
    with reserved(12):
        with CloudHypervisor(tmp_path, slots, hugetlb=True) as vmm:
            pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image")
            assert vmm.wait() == 0
        assert ImageFile(tmp_path / "image").metadata.regions[0].page_size == HUGE
        with restored(tmp_path / "image", tmp_path, name="other", request=HUGE) as (pager, vmm):
            pager.event("microvm-connected")
            pager.event("microvm-ended")
            pager.end()
            vmm.received()
            assert vmm.ask("sweep", order=list(range(0, 8 * MIB, PAGE)))["digest"] == swept(tmp_path / "image")


@pytest.mark.parametrize(
    ("message", "words"), [(page_fault(0, PAGE)[:20], "ended within the range"), (page_fault(SIZE, PAGE), "not memory")]
)
def test_invalid_request_ends_the_vm(image: Path, tmp_path: Path, message: bytes, words: str) -> None:
    requests = [page_fault(0, PAGE).hex(), message.hex()]
    with restored(image, tmp_path, requests=requests) as (pager, vmm):
        events = [pager.json() for _ in range(2)]
        while events[-1]["type"] != "serve":
            events.append(pager.json())
        failed = next(event for event in events if event["type"] == "microvm-failed")
        assert words in failed["reason"]
        assert failed["action"] == "kill"
        assert pager.wait() == FAILED
        assert vmm.wait() == -signal.SIGKILL


def test_many_queued_requests_are_answered(image: Path, tmp_path: Path) -> None:
    with restored(image, tmp_path, flood=100_000) as (pager, vmm):
        pager.event("microvm-connected")
        wait_until(lambda: proc.start_time(vmm.process.pid) is not None, "Cloud Hypervisor")
        pager.process.send_signal(signal.SIGTERM)
        assert pager.event("microvm-failed")["reason"] == "the pager was stopped"
        assert pager.event("microvm-ended")["faults"] > 0
        assert vmm.wait() == -signal.SIGKILL


@pytest.mark.parametrize("count", [1, 1000])
def test_monitor_that_exits_with_a_request_pending_ends_the_pager(image: Path, tmp_path: Path, count: int) -> None:
    with restored(image, tmp_path, exit_after=count) as (pager, vmm):
        assert vmm.wait() == 4
        events = [pager.json()["type"]]
        if events == ["microvm-connected"]:
            assert pager.event("microvm-ended")["end"] == "exited"
        assert pager.wait() in (0, WorkloadDied.exit_code, FAILED)


def test_connection_that_is_closed_early_ends_the_vm(image: Path, tmp_path: Path) -> None:
    with restored(image, tmp_path, "--no-prefetch", close_after=100) as (pager, vmm):
        found = [pager.json(), pager.json()]
        assert "before it has requested" in str(found)
        assert vmm.wait() == -signal.SIGKILL


def test_vm_without_postcopy_is_not_run_on_demand(image: Path, tmp_path: Path) -> None:
    with CloudHypervisor(tmp_path, []) as vmm:
        vmm.receive(tmp_path / "sock")
        with Pager(image, tmp_path / "sock", "--on-demand") as pager:
            assert "Postcopy" in pager.error()
            assert pager.wait() == FAILED
        assert not vmm.ask("state")["vm"]


def test_version_that_does_not_request_present_pages_is_refused(image: Path, tmp_path: Path) -> None:
    with restored(image, tmp_path, minor=False) as (pager, vmm):
        assert "use version 54 or newer" in pager.event("microvm-failed")["reason"]
        assert vmm.wait() == -signal.SIGKILL  # the VM has not run
        assert pager.event("microvm-ended")["end"] == "killed"
        assert pager.end(FAILED)["loaded"] == 0


@pytest.mark.parametrize("command", [START, MEMORY_FD, CONFIG, STATE, COMPLETE])
@pytest.mark.parametrize("way", ["refuse", "end_after"])
def test_failing_monitor_is_reported(image: Path, tmp_path: Path, command: int, way: str) -> None:
    behaviour: dict[str, Any] = {way: command}
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    with CloudHypervisor(tmp_path, [], **behaviour) as vmm:
        vmm.receive(tmp_path / "sock")
        with pytest.raises(RestoreError, match="see its log"):
            pageferry.serve(image, cloud_hypervisor=tmp_path / "sock")
        wait_until(lambda: vmm.refused, "the failed migration")
    _check_descriptors(before)


@pytest.mark.parametrize(("policy", "stopped"), [("kill", False), ("freeze", True)])
def test_stopped_pager_ends_a_vm_that_needs_pages(image: Path, tmp_path: Path, policy: str, stopped: bool) -> None:
    with restored(image, tmp_path, "--no-prefetch", "--on-failure", policy, no_prefault=True) as (pager, vmm):
        pager.event("microvm-connected")
        vmm.received()
        vmm.ask("fault", position=5 * MIB)
        pager.process.send_signal(signal.SIGTERM)
        _ended(vmm, stopped)


def _ended(vmm: CloudHypervisor, stopped: bool) -> None:
    if stopped:
        wait_until(lambda: set(proc.thread_states(vmm.process.pid)) <= set("Tt"), "the stopped process")
    else:
        assert vmm.wait() == -signal.SIGKILL


def test_killed_pager_ends_a_vm_that_needs_pages(image: Path, tmp_path: Path) -> None:
    with restored(image, tmp_path, "--no-prefetch", flood=1) as (pager, vmm):
        pager.event("microvm-connected")
        pager.kill()
        # The guardian ends it before it sees the end of the connection, at which it would exit with code 3.
        assert vmm.wait() == -signal.SIGKILL


def test_damaged_page_ends_the_vm(tmp_path: Path) -> None:
    with CloudHypervisor(tmp_path) as vmm:
        pageferry.checkpoint_cloud_hypervisor(vmm.api, tmp_path / "image", codec="none")
    file = ImageFile(tmp_path / "image")
    contents = bytearray((tmp_path / "image").read_bytes())
    at = contents.index(file.read(2001, 1)[:100])
    contents[at] ^= 1
    (tmp_path / "image").write_bytes(contents)
    with restored(tmp_path / "image", tmp_path, "--no-prefetch", name="other") as (pager, vmm):
        found = [pager.json(), pager.json()]
        failed = next(event for event in found if event["type"] == "microvm-failed")
        assert "take another checkpoint" in failed["reason"]
        assert vmm.wait() == -signal.SIGKILL
        assert pager.event("microvm-ended")["end"] == "killed"
        pager.end(FAILED)


def test_detached_pager_serves_after_the_command(image: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PAGEFERRY_RUN_DIR", str(tmp_path / "run"))
    with CloudHypervisor(tmp_path, []) as vmm:
        vmm.receive(tmp_path / "sock", memory_mode="Postcopy")
        serving = pageferry.serve(image, cloud_hypervisor=tmp_path / "sock", on_demand=True, detach=True)
        vmm.received()
        wait_until(lambda: proc.start_time(serving.pager) is None, "the exit of the pager")  # type: ignore[union-attr]
        assert vmm.ask("digest")["digest"] == digest_of(image)


def test_invalid_combinations_are_refused(image: Path, tmp_path: Path) -> None:
    sock = tmp_path / "sock"
    for options, words in (
        ({"microvms": 2}, "microvms"),
        ({"prefetch": False}, "on_demand"),
        ({"eager": True, "prefetch": False, "on_demand": True}, "eager"),
    ):
        with pytest.raises(UsageError, match=words):
            pageferry.serve(image, cloud_hypervisor=sock, **options)
    with pytest.raises(UsageError, match="on_demand"):
        pageferry.serve(image, firecracker=sock, on_demand=True)
    with pytest.raises(UsageError, match="either"):
        pageferry.serve(image)
    with pytest.raises(UsageError, match="kind cloud-hypervisor"):
        pageferry.serve(image, firecracker=sock)
    pageferry.checkpoint(pageferry.Arena(1 << 20), tmp_path / "arena")
    with pytest.raises(UsageError, match="kind arena"):
        pageferry.serve(tmp_path / "arena", cloud_hypervisor=sock)


# -- the replacement of the reference program


class Daemon(Program):
    """`pageferry-offload-daemon`."""

    def __init__(self, *words: str) -> None:
        super().__init__("-m", "pageferry.cli.offload_daemon", *words)


def listens(path: Path) -> bool:
    """Return whether a process listens on a Unix socket (flag __SO_ACCEPTCON in /proc/net/unix)."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.split()[3] == "00010000" and line.endswith(f" {path}") for line in lines)


@pytest.mark.parametrize("options", [[], ["--ondemand"]])
def test_replacement_of_the_offload_daemon_saves_and_restores(tmp_path: Path, options: list[str]) -> None:
    sock, store = tmp_path / "sock", tmp_path / "store"
    with socket.socket(socket.AF_UNIX) as left:  # as a killed process has left it
        left.bind(str(sock))
    with (
        CloudHypervisor(tmp_path) as vmm,
        Daemon("snapshot", "--socket", str(sock), "--output-dir", str(store)) as daemon,
    ):
        before = vmm.ask("digest")["digest"]
        wait_until(lambda: listens(sock), "the socket")
        with Daemon("snapshot", "--socket", str(sock), "--output-dir", str(store)) as other:
            assert other.wait() == UsageError.exit_code
        request = {"destination_url": f"unix:{sock}", "local": True, "preserve_source": True}
        Api(vmm.api).put("vm.send-migration", request)
        assert daemon.wait() == 0
        wait_until(lambda: vmm.ask("digest")["paused"], "the paused source")
    assert sorted(os.listdir(store)) == ["vm.img"]
    mode = {"memory_mode": "Postcopy"} if options else {}
    with CloudHypervisor(tmp_path, [], name="other") as vmm:
        vmm.receive(tmp_path / "restore", **mode)
        words = ("restore", "--socket", str(tmp_path / "restore"), "--input-dir", str(store), "--resume", *options)
        with Daemon(*words) as daemon:
            assert daemon.wait() == 0
        vmm.received()
        found = vmm.ask("digest")
        assert (found["digest"], found["paused"]) == (before, False)


def test_replacement_of_the_offload_daemon_keeps_a_file_in_place_of_its_socket(tmp_path: Path) -> None:
    (tmp_path / "socket").write_bytes(b"data")
    with pytest.raises(UsageError, match="not a socket"), offload_daemon._listening(tmp_path / "socket"):
        pass
    assert (tmp_path / "socket").read_bytes() == b"data"


def test_replacement_of_the_offload_daemon_reports_an_aborted_snapshot(tmp_path: Path) -> None:
    sock = tmp_path / "sock"
    with (
        CloudHypervisor(tmp_path, end_after=CONFIG) as vmm,
        Daemon("snapshot", "--socket", str(sock), "--output-dir", str(tmp_path)) as daemon,
    ):
        wait_until(lambda: sock.is_socket(), "the socket")
        Api(vmm.api).put("vm.send-migration", {"destination_url": f"unix:{sock}", "local": True})
        assert daemon.wait() == WorkloadError.exit_code
        wait_until(lambda: not vmm.ask("digest")["paused"], "the resumed VM")
    assert not (tmp_path / "vm.img").exists()
    assert not sock.exists()
