"""MicroVMs whose memory `pageferry serve` loads from an image, with a fake of Firecracker's side."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.errors import RestoreError, UsageError
from pageferry.host import proc
from pageferry.images.working_set import path_of
from pageferry.pager.firecracker.events import ServeResult
from tests.hugetlb import reserved
from tests.kernel import fake_firecracker
from tests.kernel.fake_firecracker import HUGE, PAGE, Handshake
from tests.kernel.programs import DEADLINE, Program, wait_until

PAGES = 4096
LENGTH = PAGES * PAGE


def contents_of(pages: int) -> bytes:
    """Return memory with zero pages, patterns, duplicates and data."""
    generator = np.random.default_rng(5)
    memory = generator.integers(0, 256, pages * PAGE, dtype="u1").reshape(pages, PAGE)
    memory[:, 2048:] = 7  # compressible
    memory[::8] = 0
    memory[1::16] = 3
    memory[2::16] = memory[3]
    memory[pages // 2 : pages // 2 + 600] = 0
    return memory.tobytes()


CONTENTS = contents_of(PAGES)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the image of a snapshot."""
    folder = tmp_path_factory.mktemp("snapshot")
    (folder / "memory").write_bytes(CONTENTS)
    (folder / "state").write_bytes(b"state")
    pageferry.import_image(folder / "image", firecracker=folder / "memory", vmstate=folder / "state")
    return folder / "image"


class Pager(Program):
    """`pageferry serve`, whose socket accepts connections."""

    def __init__(self, image: Path, path: Path, *options: str) -> None:
        words = ("-m", "pageferry", "serve", str(image), "--firecracker", str(path), *options, "--output", "json")
        super().__init__(*words, stderr=subprocess.DEVNULL)
        self.path = path
        assert self.event("serving")["socket"] == str(path)

    def event(self, kind: str) -> dict[str, Any]:
        """Return the next event, which must be of this type."""
        found: dict[str, Any] = self.json()
        assert found["type"] == kind, found
        return found

    def end(self, code: int = 0) -> dict[str, Any]:
        """Wait for the result and the exit of the pager."""
        result = self.event("serve")
        assert self.wait() == code
        assert not self.path.exists()
        return result


class Firecracker(Program):
    """Fake Firecracker that sends its handshake."""

    def __init__(self, path: Path, sizes: list[int] | None = None, page_size: int = PAGE, **handshake: Any) -> None:
        chosen = fake_firecracker.settings(str(path), sizes or [LENGTH], page_size, Handshake(**handshake))
        super().__init__(fake_firecracker.__file__, chosen)
        assert self.json() == {"mapped": True}

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Execute a command, and return its result."""
        self.say(json.dumps({"what": what, **arguments}))
        found: dict[str, Any] = self.json()
        return found

    def read(self, offset: int, length: int = PAGE) -> bytes:
        """Read memory."""
        return bytes.fromhex(self.ask("read", offset=offset, length=length)["contents"])

    def digest(self, threads: int = 3, step: int = PAGE) -> str:
        """Read all memory in random order by several threads. Return the digest of its contents."""
        order = np.random.default_rng(1).permutation(LENGTH // step).astype(int) * step
        found: str = self.ask("sweep", threads=threads, order=order.tolist(), step=step)["digest"]
        return found


def expected(step: int = PAGE, contents: bytes = CONTENTS) -> str:
    """Return the digest that `Firecracker.digest` returns for these contents."""
    parts = (contents[at : at + step] for at in range(0, LENGTH, step))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@contextmanager
def served(image: Path, tmp_path: Path, *options: str, **chosen: Any) -> Iterator[tuple[Pager, Firecracker]]:
    """Serve one microVM."""
    with Pager(image, tmp_path / "sock", *options) as pager, Firecracker(pager.path, **chosen) as vmm:
        assert pager.event("microvm-connected")["microvm"] == vmm.process.pid
        yield pager, vmm


@pytest.mark.parametrize(
    "handshake",
    [
        {"version": (1, 1)},
        {"version": (1, 7)},
        {"version": (1, 12), "parts": 3},
        {"descriptors": ("userfault", "pipe")},
    ],
    ids=["1.1", "1.7", "1.12", "two-descriptors"],
)
def test_memory_is_that_of_the_image_with_every_version(image: Path, tmp_path: Path, handshake: Any) -> None:
    with served(image, tmp_path, sizes=[LENGTH // 4 * 3, LENGTH // 4], **handshake) as (pager, vmm):
        assert vmm.digest() == expected()
        ended = pager.event("microvm-ended")
        assert (ended["end"], ended["deferred"]) == ("loaded", 0)
        assert pager.end() | {"socket": ""} == {
            "type": "serve",
            "image": str(image),
            "socket": "",
            "microvms": 1,
            "loaded": 1,
            "failed": [],
        }
        assert vmm.digest() == expected()  # Firecracker continues without the pager
        assert vmm.ask("free", offset=0, length=LENGTH // 2) == {}
        assert vmm.read(PAGE) == bytes(PAGE)


def test_hugetlb_pages_are_loaded_whole(image: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sizes": [LENGTH // 4 * 3, LENGTH // 4], "page_size": HUGE}
    with reserved(LENGTH // HUGE), served(image, tmp_path, "--no-prefetch", **options) as (pager, vmm):
        half = LENGTH // 2  # 600 pages of zeros, beginning with a huge page of zeros
        assert vmm.read(half) == bytes(PAGE)
        vmm.ask("free", offset=HUGE, length=HUGE)  # before it was loaded
        assert vmm.read(HUGE, HUGE) == bytes(HUGE)
        assert vmm.read(2 * HUGE, HUGE) == CONTENTS[2 * HUGE : 3 * HUGE]
        vmm.ask("free", offset=2 * HUGE, length=HUGE)
        assert vmm.read(2 * HUGE, HUGE) == bytes(HUGE)
        now = bytearray(CONTENTS)
        now[HUGE : 3 * HUGE] = bytes(2 * HUGE)
        assert vmm.digest(step=HUGE) == expected(HUGE, bytes(now))
        assert pager.event("microvm-ended")["end"] == "loaded"
        assert pager.end()["loaded"] == 1


def test_freed_pages_are_zeros_whether_or_not_they_were_loaded(image: Path, tmp_path: Path) -> None:
    with served(image, tmp_path, "--no-prefetch") as (pager, vmm):
        vmm.ask("free", offset=16 * PAGE, length=32 * PAGE)
        assert vmm.read(16 * PAGE, 32 * PAGE) == bytes(32 * PAGE)
        assert vmm.read(64 * PAGE, 16 * PAGE) == CONTENTS[64 * PAGE : 80 * PAGE]
        vmm.ask("free", offset=64 * PAGE, length=16 * PAGE)
        assert vmm.read(64 * PAGE, 16 * PAGE) == bytes(16 * PAGE)
        vmm.ask("write", offset=64 * PAGE, contents=b"written".hex())
        assert vmm.read(64 * PAGE, 7) == b"written"
        vmm.kill()
        assert pager.event("microvm-ended")["end"] == "exited"
        pager.end()


@pytest.mark.parametrize("options", [("--no-prefetch",), (), ("--eager",)], ids=["demand", "gentle", "eager"])
def test_no_freed_page_gets_its_old_contents_back(image: Path, tmp_path: Path, options: Any) -> None:
    """Two threads read each page while a third one frees it, and the pager loads everything."""
    with served(image, tmp_path, *options) as (pager, vmm):
        freed = [page for page in range(PAGES) if page % 4 == 3]
        offsets = np.random.default_rng(2).permutation(freed).astype(int) * PAGE
        assert vmm.ask("churn", offsets=offsets.tolist(), step=PAGE) == {"wrong": []}
        now = bytearray(CONTENTS)
        for page in freed:
            now[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        assert vmm.digest() == expected(contents=bytes(now))
        vmm.kill()
        pager.event("microvm-ended")
        pager.end()


def test_working_set_of_the_last_restore_is_loaded_first(image: Path, tmp_path: Path) -> None:
    touched = [PAGE * 640, PAGE * 64, PAGE * 2048 - PAGE * 32]
    with served(image, tmp_path, "--no-prefetch") as (pager, vmm):
        for offset in touched:
            assert vmm.read(offset + 5 * PAGE) == CONTENTS[offset + 5 * PAGE : offset + 6 * PAGE]
        vmm.kill()
        assert pager.event("microvm-ended")["missed"] == 3
        pager.end()
    assert path_of(image).exists()
    with served(image, tmp_path) as (pager, vmm):
        assert pager.event("microvm-ended")["prefetched"] > 0
        pager.end()
        assert vmm.digest() == expected()
    path_of(image).unlink()


def damaged(image: Path, tmp_path: Path) -> Path:
    """Return a copy of the image with a damaged storage block."""
    contents = bytearray(image.read_bytes())
    contents[len(contents) // 2 : len(contents) // 2 + 64] = bytes(64)
    copy = tmp_path / "damaged"
    copy.write_bytes(contents)
    return copy


def test_damaged_page_kills_the_microvm(image: Path, tmp_path: Path) -> None:
    with served(damaged(image, tmp_path), tmp_path) as (pager, vmm):
        vmm.say(json.dumps({"what": "read", "offset": 0, "length": LENGTH}))
        assert vmm.wait() == -signal.SIGKILL
        events = [pager.json()]
        while events[-1]["type"] != "serve":
            events.append(pager.json())
        assert [one["action"] for one in events if one["type"] == "microvm-failed"][-1] == "kill"
        assert events[-2]["end"] == "killed"
        assert f"cannot be read from {tmp_path / 'damaged'}" in events[-1]["failed"][0]
        assert pager.wait() == RestoreError.exit_code


def test_damaged_page_freezes_the_microvm_if_requested(image: Path, tmp_path: Path) -> None:
    options = ("--on-failure", "freeze", "--no-prefetch")
    with served(damaged(image, tmp_path), tmp_path, *options) as (pager, vmm):
        vmm.say(json.dumps({"what": "read", "offset": 0, "length": LENGTH}))
        failed = pager.event("microvm-failed")
        assert failed["action"] == "freeze"
        stat = Path(f"/proc/{vmm.process.pid}/stat")
        wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", "a stopped process")
        vmm.kill()
        pager.event("microvm-ended")
        assert pager.wait() == RestoreError.exit_code


def test_page_that_fails_after_many_others_kills_the_microvm_too(image: Path, tmp_path: Path) -> None:
    contents = bytearray(image.read_bytes())
    middle = slice(len(contents) // 4, len(contents) * 3 // 4)
    contents[middle] = bytes(middle.stop - middle.start)
    copy = tmp_path / "damaged"
    copy.write_bytes(contents)
    with served(copy, tmp_path) as (pager, vmm):
        for _ in range(64):  # maximum number of pages that the background reports
            pager.event("microvm-failed")
        vmm.say(json.dumps({"what": "read", "offset": LENGTH * 5 // 8 // PAGE * PAGE, "length": LENGTH // 16}))
        assert vmm.wait() == -signal.SIGKILL
        assert pager.wait() == RestoreError.exit_code


BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"cut": 40}, "ended after 40 bytes", "none"),
    ({"descriptors": ()}, "no descriptor", "none"),
    ({"descriptors": ("pipe", "userfault")}, "not a userfaultfd", "kill"),
    ({"descriptors": ("userfault",) * 5}, "more than 3 descriptors", "kill"),
    ({"text": "[{}]"}, "missing required field", "kill"),
    ({"text": "hello"}, "invalid memory mappings", "kill"),
    ({"change": {"size": PAGE}}, "bytes of memory, the image", "kill"),
    ({"change": {"size": -1}}, "not a multiple", "kill"),
    ({"change": {"offset": PAGE}}, "no mapping of offset 0", "kill"),
]


def test_broken_handshakes_are_refused_and_leave_nothing(image: Path, tmp_path: Path) -> None:
    """Each broken process is refused with the cause, and killed if it waits for memory. The next microVM is served."""
    with Pager(image, tmp_path / "sock") as pager:
        descriptors = f"/proc/{pager.process.pid}/fd"
        before = len(os.listdir(descriptors))
        for handshake, cause, action in BROKEN:
            with Firecracker(pager.path, **handshake) as vmm:
                refused = pager.event("microvm-refused")
                assert cause in refused["reason"]
                assert (refused["microvm"], refused["action"]) == (vmm.process.pid, action)
                if action == "kill":
                    assert vmm.wait() == -signal.SIGKILL
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(pager.path))
        assert "ended after 0 bytes" in pager.event("microvm-refused")["reason"]
        wait_until(lambda: len(os.listdir(descriptors)) == before, "closed descriptors")
        with Firecracker(pager.path) as vmm:
            pager.event("microvm-connected")
            assert vmm.digest() == expected()
            pager.event("microvm-ended")
            pager.end()


def test_fault_outside_the_described_memory_stops_the_microvm(image: Path, tmp_path: Path) -> None:
    with served(image, tmp_path, "--no-prefetch", hidden=8 * PAGE) as (pager, vmm):
        vmm.ask("fault", offset=LENGTH)
        failed = pager.event("microvm-failed")
        assert "outside the memory" in failed["reason"]
        assert vmm.wait() == -signal.SIGKILL
        pager.event("microvm-ended")
        assert pager.wait() == RestoreError.exit_code


def test_microvm_that_exits_in_the_middle_of_faults_ends_the_pager(image: Path, tmp_path: Path) -> None:
    with served(image, tmp_path, "--no-prefetch") as (pager, vmm):
        order = list(range(0, LENGTH, PAGE))
        vmm.say(json.dumps({"what": "sweep", "threads": 8, "order": order, "step": PAGE}))
        vmm.kill()
        assert pager.event("microvm-ended")["end"] == "exited"
        assert pager.end()["failed"] == []


def test_several_microvms_of_one_image_do_not_affect_each_other(image: Path, tmp_path: Path) -> None:
    with Pager(image, tmp_path / "sock", "--microvms", "3", "--no-prefetch") as pager:
        with Firecracker(pager.path) as one, Firecracker(pager.path) as other, Firecracker(pager.path) as third:
            one.ask("write", offset=PAGE, contents=b"one".hex())
            other.kill()
            assert third.read(PAGE, 3) == CONTENTS[PAGE : PAGE + 3]
            assert one.read(PAGE, 3) == b"one"
            assert third.digest() == expected()
        kinds = sorted(pager.json()["type"] for _ in range(6))
        assert kinds == ["microvm-connected"] * 3 + ["microvm-ended"] * 3
        assert pager.end()["microvms"] == 3


@pytest.mark.parametrize(("policy", "code"), [("kill", -signal.SIGKILL), ("freeze", None)])
def test_stopped_pager_does_not_leave_a_microvm_that_waits_for_ever(
    image: Path, tmp_path: Path, policy: str, code: int | None
) -> None:
    with served(image, tmp_path, "--no-prefetch", "--on-failure", policy) as (pager, vmm):
        pager.process.send_signal(signal.SIGTERM)
        assert pager.event("microvm-failed")["reason"] == "the pager was stopped"
        if code is not None:
            assert vmm.wait() == code
        pager.event("microvm-ended")
        assert pager.wait() == 128 + signal.SIGTERM
        assert not pager.path.exists()


def test_detached_pager_outlives_the_command(image: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pageferry", "serve", str(image), "--firecracker", str(tmp_path / "sock")]
    words = [*command, "--detach", "--output", "json"]
    done = subprocess.run(words, check=True, timeout=DEADLINE, capture_output=True)
    serving = json.loads(done.stdout)
    log = Path(serving["log"])
    refused = subprocess.run(words, check=False, timeout=DEADLINE, capture_output=True)
    assert refused.returncode == UsageError.exit_code
    assert b"another process listens on it" in refused.stderr
    with Firecracker(tmp_path / "sock") as vmm:
        assert vmm.digest() == expected()
        wait_until(lambda: proc.start_time(serving["pager"]) is None, "the exit of the pager")
    assert f"microVM {vmm.process.pid}: loaded" in log.read_text()
    assert not (tmp_path / "sock").exists()


def test_socket_is_private_and_does_not_replace_other_files(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # as a killed pager leaves it
    with Pager(image, path) as pager:
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(UsageError, match="another process listens"):
            pageferry.serve(image, firecracker=path)
        pager.kill()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="not a socket"):
        pageferry.serve(image, firecracker=tmp_path / "file")
    with pytest.raises(UsageError, match="longer than 107"):
        pageferry.serve(image, firecracker=tmp_path / ("x" * 110))
    pageferry.checkpoint(pageferry.Arena(1 << 20), tmp_path / "arena")
    with pytest.raises(UsageError, match="kind arena"):
        pageferry.serve(tmp_path / "arena", firecracker=tmp_path / "other")
    assert (tmp_path / "file").read_text() == "kept"


def test_python_program_serves_with_events(image: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    vmms: list[Firecracker] = []

    def heard(event: Any) -> None:
        events.append(event)
        if len(events) == 1:  # the socket accepts connections
            vmms.append(Firecracker(tmp_path / "sock"))

    result = pageferry.serve(image, firecracker=tmp_path / "sock", eager=True, listener=heard)
    with vmms[0] as vmm:
        assert vmm.digest() == expected()
    assert isinstance(result, ServeResult)
    assert result.loaded == 1
    assert [type(event).__name__ for event in events] == ["Serving", "MicrovmConnected", "MicrovmEnded"]
