"""Tests of the commands and Python programs in README and the guide.

Each page is followed from top to bottom, block by block. A guest that a page assumes is started before the first
command that names it. Output blocks are not compared.
"""

from __future__ import annotations

import itertools
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pageferry.errors import UnsupportedError
from tests.use.hosts import ROOT, Host

PAGES = ["README.md", "docs/guide/qemu.md", "docs/guide/python.md", "docs/guide/ram.md"]
ANOTHER_HOST = "other host"
OURS = {"make demo", "make test"}
"""Commands in the pages that this test does not run."""
VERBS = {"migrate", "checkpoint", "pause", "resume", "monitor", "logs", "large-pages", "sharing", "peek"}
"""Verbs whose arguments are names of workloads that must exist."""
NAME = re.compile(r"[a-z]+[0-9]*")


@dataclass
class Page:
    """Page of the documentation, followed on two hosts."""

    here: Host
    there: Host
    port: int
    process: subprocess.Popen[bytes] | None = None
    receivers: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, line: str) -> None:
        """Run a command line of the page."""
        command, _, remark = line.partition("  #")
        command = command.strip().replace("7070", str(self.port))
        if command in OURS:
            return
        host = self.there if ANOTHER_HOST in remark else self.here
        if " pid:4711" in command:
            command = command.replace("4711", str(self.some_process()))
        if "pageferry receive" in command:
            self.receivers.append(host.start(command, "listening on"))
            return
        for name in needed(command):
            host.provide(name)
        done = host.run(command)
        if done.returncode == UnsupportedError.exit_code:
            # This machine lacks a feature, which the message names. `pageferry check` reports it too.
            assert "swap" in done.stderr or "KSM" in done.stderr, done.stderr
            return
        assert done.returncode == 0, f"{command}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"

    def some_process(self) -> int:
        """Return the pid of a process with 80 MiB of identical pages. The first call starts the process."""
        if self.process is None:
            program = "import time; memory = bytearray(b'%4096d' % 7 * 20000); print('.', flush=True); time.sleep(1000)"
            self.process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
            assert self.process.stdout is not None
            self.process.stdout.readline()
        return self.process.pid

    def program(self, text: str) -> None:
        """Run a Python program of the page. Start a receiver first if the program migrates."""
        port = free_port()  # `self.port` may still be in use by the receiver of a guest
        text = text.replace("7070", str(port))
        file = self.here.work / "program.py"
        file.write_text(text)
        if "pageferry.migrate(" in text:
            receiver = f"import pageferry; pageferry.receive('127.0.0.1:{port}', listening=print)"
            self.there.start(f"{shlex.quote(sys.executable)} -uc {shlex.quote(receiver)}", str(port))
        done = self.here.run(f"{shlex.quote(sys.executable)} program.py")
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"

    def close(self) -> None:
        """Kill the process that was started for the page."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


def free_port() -> int:
    """Return a TCP port on which no process listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def needed(command: str) -> list[str]:
    """Return the names of the workloads that a command requires."""
    program, verb, *words = command.split()
    if program != "pageferry" or verb not in VERBS:
        return []
    return list(itertools.takewhile(NAME.fullmatch, words[:1] if verb == "monitor" else words))


def blocks(path: Path) -> list[tuple[str, str]]:
    """Return the language and text of each fenced block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES)
def test_page_can_be_followed(page: str, hosts: tuple[Host, Host]) -> None:
    session = Page(*hosts, free_port())
    done = 0
    try:
        for language, text in blocks(ROOT / page):
            if language == "console":
                for line in text.splitlines():
                    if line.startswith("$ "):
                        session.command(line[2:])
                        done += 1
            elif language == "python":
                session.program(text)
                done += 1
    finally:
        session.close()
    assert done > 3
