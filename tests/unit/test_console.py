"""Tests of consoles and monitors without a guest: terminals, pipes, character devices, commands."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pageferry.control import console
from pageferry.control.monitor import _name, parse_qmp
from pageferry.errors import UnsupportedError, UsageError, WorkloadError
from pageferry.host.registry import QemuEntry, identify
from pageferry.workloads.qemu.command_line import parse

QEMU = "qemu-system-x86_64"
DEADLINE = 60

PROGRAM = """
import os, socket, sys, threading
from pageferry.cli import console
from pageferry.cli.main import main
from pageferry.control.console import Console

ours, guest = socket.socketpair()

async def opened(name, chardev=None):
    return Console(name, ours.detach(), os.open("/dev/null", os.O_RDONLY))

def echo():
    guest.sendall(b"login: ")
    while data := guest.recv(100):
        if b"q" in data:
            guest.close()
            return
        guest.sendall(data.upper())

console.console_async = opened
if sys.argv[1] != "deaf":
    threading.Thread(target=echo, daemon=True).start()
sys.exit(main(["console", "web"]))
"""


@contextmanager
def on_terminal(kind: str = "echo") -> Iterator[tuple[subprocess.Popen[bytes], int, list[Any]]]:
    """Start the console of a simulated guest on a pseudo-terminal. Yield the process, the terminal and its settings."""
    terminal, inner = pty.openpty()
    before = termios.tcgetattr(inner)
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind], stdin=inner, stdout=inner, stderr=inner, start_new_session=True
    )
    try:
        yield child, terminal, before
    finally:
        child.kill()
        child.wait()
        os.close(terminal)
        os.close(inner)


def read_until(terminal: int, expected: bytes) -> bytes:
    found, deadline = b"", time.monotonic() + DEADLINE
    while expected not in found:
        ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
        assert ready, found
        found += os.read(terminal, 1 << 16)
    return found


def test_keys_are_sent_and_the_escape_key_detaches() -> None:
    with on_terminal() as (child, terminal, before):
        read_until(terminal, b"login: ")
        assert termios.tcgetattr(terminal) != before
        os.write(terminal, b"a\x03\x1a\r")
        read_until(terminal, b"A\x03\x1a\r")
        os.write(terminal, b"b\x1dc")
        assert b"web: detached" in read_until(terminal, b"detached")
        assert child.wait(DEADLINE) == 0
        assert termios.tcgetattr(terminal) == before


def test_escape_key_detaches_from_a_guest_that_does_not_read() -> None:
    with on_terminal("deaf") as (child, terminal, before):
        read_until(terminal, b"Ctrl-] detaches")
        wait_for_raw(terminal, before)
        for _ in range(100):
            os.write(terminal, b"x" * 4000)
        os.write(terminal, b"\x1d")
        assert child.wait(DEADLINE) == 0
        assert termios.tcgetattr(terminal) == before


def test_end_of_the_guest_ends_the_console() -> None:
    with on_terminal() as (child, terminal, before):
        read_until(terminal, b"login: ")
        os.write(terminal, b"q")
        read_until(terminal, b"web: the guest has closed its console")
        assert child.wait(DEADLINE) == 0
        assert termios.tcgetattr(terminal) == before


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, -signal.SIGHUP), (signal.SIGQUIT, -signal.SIGQUIT)],
)
def test_signal_restores_the_terminal(number: signal.Signals, code: int) -> None:
    with on_terminal() as (child, terminal, before):
        read_until(terminal, b"login: ")
        wait_for_raw(terminal, before)
        child.send_signal(number)
        assert child.wait(DEADLINE) == code
        assert termios.tcgetattr(terminal) == before


def wait_for_raw(terminal: int, before: list[Any]) -> None:
    deadline = time.monotonic() + DEADLINE
    while termios.tcgetattr(terminal) == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_pipe_is_copied_until_the_guest_ends() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "echo"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"a\x1db\n")
        child.stdin.flush()
        read_until(child.stdout.fileno(), b"login: A\x1dB\n")
        child.stdin.write(b"q")
        child.stdin.close()
        assert child.wait(DEADLINE) == 0


# -- character devices


def entry() -> QemuEntry:
    return QemuEntry(**identify(os.getpid()), qmp_socket="/qmp")


@pytest.mark.parametrize(
    ("filename", "path"),
    [
        ("disconnected:unix:/run/x,y.sock,server=on", "/run/x,y.sock"),
        ("disconnected:unix:x.sock,server=on", f"{os.getcwd()}/x.sock"),
        ("pty:/dev/pts/7", "/dev/pts/7"),
    ],
)
def test_path_of_a_character_device_is_found(filename: str, path: str) -> None:
    assert console._path("web", entry(), "serial0", [{"label": "serial0", "filename": filename}]) == path


@pytest.mark.parametrize("filename", ["stdio", "mux", "file", "disconnected:tcp:0:1,server=on", "unix:/x.sock", "vc"])
def test_character_device_that_is_not_a_console_is_refused(filename: str) -> None:
    with pytest.raises(UnsupportedError, match="server=on,wait=off"):
        console._path("web", entry(), "serial0", [{"label": "serial0", "filename": filename}])


def test_console_of_another_client_is_refused() -> None:
    devices = [{"label": "serial0", "filename": "unix:/x.sock,server=on"}]
    with pytest.raises(WorkloadError, match=r"another client has opened /x.sock"):
        console._path("web", entry(), "serial0", devices)
    with pytest.raises(UnsupportedError, match="use one of serial0"):
        console._path("web", entry(), "none", devices)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        (["-serial", "chardev:mine"], "mine"),
        (["-nographic", "-serial", "unix:/x,server=on"], "serial0"),
        (["-device", '{"driver":"isa-serial","chardev":"charserial0","id":"serial0"}'], "charserial0"),
        (["-device", "virtio-serial", "-serial", "pty"], "serial0"),
    ],
)
def test_character_device_of_the_serial_port_is_found(
    monkeypatch: pytest.MonkeyPatch, options: list[str], label: str
) -> None:
    monkeypatch.setattr("pageferry.host.proc.arguments", lambda _: [QEMU, "-m", "1G", *options])
    assert console._serial_label("web", entry()) == label


@pytest.mark.parametrize(("options", "reason"), [([], "is not connected"), (["-nographic"], "pageferry logs web")])
def test_guest_without_a_console_is_refused(monkeypatch: pytest.MonkeyPatch, options: list[str], reason: str) -> None:
    monkeypatch.setattr("pageferry.host.proc.arguments", lambda _: [QEMU, *options])
    with pytest.raises(UnsupportedError, match=reason):
        console._serial_label("web", entry())


@pytest.mark.parametrize(
    ("options", "free"),
    [
        ([], True),
        (["-display", "none", "-device", "virtio-net", "-chardev", "pty,id=x"], True),
        (["-vnc", ":1"], True),
        (["-serial", "none"], False),
        (["-nographic"], False),
        (["-nodefaults"], False),
        (["-curses"], False),
        (["-device", "isa-serial,chardev=x"], False),
        (["-device", '{"driver":"pci-serial","chardev":"x"}'], False),
    ],
)
def test_console_is_added_if_the_serial_port_is_not_used(options: list[str], free: bool) -> None:
    command = parse([QEMU, *options])
    assert command.has_free_serial == free
    words = command.managed(ram_path="/x", qmp_socket="/qmp", incoming=False, console="/run/a,b/tty.sock")
    assert words[words.index("-serial", 1 + len(options)) :] == ["-serial", "chardev:pageferry-console"]
    assert "socket,id=pageferry-console,path=/run/a,,b/tty.sock,server=on,wait=off" in words


# -- commands of the monitor


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("query-status", ("query-status", None)),
        ('{"execute": "stop"}', ("stop", None)),
        ('{"execute": "stop", "arguments": {}, "id": 1}', ("stop", {})),
        ('{"execute": "getfd", "arguments": {"fdname": "x"}}', ("getfd", {"fdname": "x"})),
    ],
)
def test_qmp_commands_are_parsed(line: str, parsed: tuple[str, Any]) -> None:
    assert parse_qmp(line) == parsed


@pytest.mark.parametrize("line", ["{", "{}", '{"execute": 1}', '{"execute": "x", "arguments": []}', '{"execut": "x"}'])
def test_invalid_qmp_commands_are_refused(line: str) -> None:
    with pytest.raises(UsageError, match="invalid QMP command"):
        parse_qmp(line)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ({"execute": "cont"}, "cont"),
        ({"execute": "human-monitor-command", "arguments": {"command-line": " c "}}, "c"),
        ({"execute": "human-monitor-command", "arguments": {"command-line": ""}}, ""),
        ({"execute": "human-monitor-command"}, ""),
    ],
)
def test_name_of_a_command_is_that_of_hmp(command: dict[str, Any], name: str) -> None:
    assert _name(command) == name
