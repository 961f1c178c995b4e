"""Tests of the programs in examples/."""

from __future__ import annotations

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


def test_clones_run_from_one_image(hosts: tuple[Host, Host]) -> None:
    here, _ = hosts
    here.environment["BOOT_SECONDS"] = "1"
    done = here.run(f"{EXAMPLES / 'clones.sh'} {GUEST}")
    assert done.returncode == 0, done.stdout + done.stderr
    for guest in ("base", "clone1", "clone2"):
        assert re.search(rf"^ *{guest} .*running", done.stdout, re.MULTILINE), done.stdout
        assert not here.has(guest)
    assert os.listdir(here.work) == []
