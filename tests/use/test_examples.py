"""Tests of the programs in examples/."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.use.hosts import GUEST, ROOT, Host

EXAMPLES = ROOT / "examples"


def free_port() -> int:
    """Return a TCP port on which no process listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


PYTHON = shlex.quote(sys.executable)


def test_table_is_saved_and_reopened(hosts: tuple[Host, Host]) -> None:
    here, _ = hosts
    for step in ("fill", "open"):
        done = here.run(f"{PYTHON} {EXAMPLES / 'table.py'} {step} table.img")
        assert done.returncode == 0, done.stderr
    assert "all rows are correct" in done.stdout


def test_job_over_a_data_frame_is_saved_and_resumed(hosts: tuple[Host, Host]) -> None:
    pytest.importorskip("pandas")
    here, _ = hosts
    for step in ("start", "resume"):
        done = here.run(f"{PYTHON} {EXAMPLES / 'dataframe_job.py'} {step} job.img")
        assert done.returncode == 0, done.stderr
    assert re.search(r"^resumed with [1-9]\d* rows done\nall rows are correct$", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("kind", ["threads", "asyncio", "processes"])
def test_counters_are_saved_and_migrated_consistently(kind: str, hosts: tuple[Host, Host]) -> None:
    here, there = hosts
    program, address = f"{PYTHON} -u {EXAMPLES / f'counters_{kind}.py'}", f"127.0.0.1:{free_port()}"
    receiver = there.start(f"{program} receive {address}", "listening on")
    done = here.run(f"{program} send {address} counters.img")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^saved: [1-9]\d* additions, complete$", done.stdout, re.MULTILINE), done.stdout
    assert receiver.wait(30) == 0


class Client(threading.Thread):
    """Thread that requests entries of the index continuously, and records incorrect replies."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = str(path)
        self.answers = 0
        self.wrong: list[str] = []
        self.enough = threading.Event()

    def run(self) -> None:
        number = 7
        while not self.enough.is_set():
            number = number * 48271 % 4_000_000
            try:
                answer: object = self.ask(number)
            except (OSError, ValueError) as error:
                answer = error
            if answer != number * number % 1_000_003:
                self.wrong.append(f"{number}: {answer!r}")
            self.answers += 1

    def ask(self, number: int) -> int:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.path)
            connection.sendall(b"%d\n" % number)
            with connection.makefile() as lines:
                return int(lines.readline())


def test_index_server_is_replaced_without_failing_a_request(hosts: tuple[Host, Host]) -> None:
    here, _ = hosts
    path = here.work / "index.sock"
    program = f"{PYTHON} -u {EXAMPLES / 'index_server.py'}"
    first = here.start(f"{program} serve {path}", "serves")
    client = Client(path)
    client.start()
    try:
        second = here.start(f"{program} replace {path}", "serves")
        assert first.wait(30) == 0
        here.start(f"{program} replace {path}", "serves")
        assert second.wait(30) == 0
        before, deadline = client.answers, time.monotonic() + 30
        while client.answers < before + 10 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        client.enough.set()
        client.join()
    assert client.wrong == []
    assert client.answers > before + 9


def test_workers_hold_the_memory_of_a_model_once(hosts: tuple[Host, Host]) -> None:
    here, _ = hosts
    done = here.run(f"{PYTHON} {EXAMPLES / 'model_workers.py'} model.img")
    assert done.returncode == 0, done.stderr
    one, four = (int(found) for found in re.findall(r"hold (\d+) MiB", done.stdout))
    assert one >= 60
    assert four <= 1.1 * one


def entry(number: int) -> bytes:
    """Return the contents of an entry. The first ones require that the arena of 64 MiB grows."""
    return b"%d" % number * ((4 << 20) if 0 < number < 30 else 1)


class Writer(threading.Thread):
    """Thread that stores entries in a key-value service and reads them again, and records lost requests."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.stored = 0
        self.wrong: list[str] = []
        self.enough = threading.Event()

    def run(self) -> None:
        while not self.enough.is_set():
            number = self.stored
            try:
                assert self.request("PUT", number, entry(number)) == (201, b"")
                for other in {number, number // 2, 0}:
                    assert self.request("GET", other) == (200, entry(other))
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.wrong.append(f"{number}: {error!r}")
            self.stored += 1

    def request(self, method: str, number: int, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, f"/{number}", body)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()


def test_key_value_service_is_replaced_without_losing_a_request(hosts: tuple[Host, Host]) -> None:
    here, _ = hosts
    here.environment["PORT"] = str(port := free_port())
    program, path = f"{PYTHON} -u {EXAMPLES / 'kv_server.py'}", here.work / "kv.sock"
    first = here.start(f"{program} serve {path}", "serves 0 entries")
    writer = Writer(port)
    writer.start()
    try:
        with socket.socket(socket.AF_UNIX) as failing:  # a new version that exits
            failing.connect(str(path))
            assert failing.recv(16)
        here.start(f"{program} replace {path}", "serves")
        assert first.wait(30) == 0
        before, deadline = writer.stored, time.monotonic() + 30
        while writer.stored < before + 10 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        writer.enough.set()
        writer.join()
    assert writer.wrong == []
    assert writer.stored > before + 9


def test_clones_run_from_one_image(hosts: tuple[Host, Host]) -> None:
    here, _ = hosts
    here.environment["BOOT_SECONDS"] = "1"
    done = here.run(f"{EXAMPLES / 'clones.sh'} {GUEST}")
    assert done.returncode == 0, done.stdout + done.stderr
    for guest in ("base", "clone1", "clone2"):
        assert re.search(rf"^ *{guest} .*running", done.stdout, re.MULTILINE), done.stdout
        assert not here.has(guest)
    assert os.listdir(here.work) == []


@pytest.mark.timeout(400)  # a dozen commands
def test_day_of_an_operator_ends_without_guests(hosts: tuple[Host, Host]) -> None:
    here, _ = hosts
    here.environment["SHUTDOWN_TIMEOUT"] = "1s"
    done = here.run(f"{EXAMPLES / 'day.sh'} {GUEST}", timeout=360)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^ *web .*running", done.stdout, re.MULTILINE)) == 3, done.stdout
    assert "VM status: running" in done.stdout
    for verb in ("pause", "paused"), ("resume", "running"):
        assert f"web: {verb[1]}" in done.stdout
    assert not here.has("web")
    assert os.listdir(here.work) == []
