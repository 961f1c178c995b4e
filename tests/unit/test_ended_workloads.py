"""Tests of the records and logs of workloads that have ended."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import pageferry
from pageferry.cli.main import main
from pageferry.control import logs
from pageferry.control.options import LogOptions
from pageferry.errors import NoSuchWorkload, UnsupportedError, UsageError
from pageferry.host import endings
from pageferry.host.registry import Folder, QemuEntry, Registry, identify


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("PAGEFERRY_RUN_DIR", str(tmp_path / "run"))
    return Registry()


def register(registry: Registry, name: str, log: bytes | None = None, *, running: bool = False) -> Folder:
    """Register a guest with a log. Its process is this one if `running`, otherwise one that has exited."""
    folder = registry.claim(name)
    entry = QemuEntry(**identify(os.getpid()), qmp_socket="/nowhere")
    if log is not None:
        (folder.path / "log").write_bytes(log)
    folder.publish(entry if running else msgspec.structs.replace(entry, started=1))
    return folder


def test_log_of_a_guest_that_has_exited_is_kept_until_its_name_is_used_again(registry: Registry) -> None:
    register(registry, "web", b"qemu: out of memory\n")
    with pytest.raises(NoSuchWorkload, match="it has ended, see `pageferry list --all`"):
        registry.lookup("web")
    assert not (registry.path / "web").exists()
    assert pageferry.logs("web") == "qemu: out of memory\n"
    (record,) = registry.ended_workloads()
    assert (record.name, record.kind, record.pid, record.cause) == ("web", "qemu", os.getpid(), "exited")
    assert (record.exact, record.code) == (False, None)
    registry.claim("web")
    assert registry.ended_workloads() == []
    with pytest.raises(UnsupportedError, match="cannot read the log"):
        pageferry.logs("web")


def test_claim_of_a_process_that_has_exited_leaves_no_record(registry: Registry) -> None:
    command = "from pageferry.host.registry import Registry; Registry().claim('web')"
    subprocess.run([sys.executable, "-c", command], check=True, timeout=60)
    assert registry.entries() == {}
    assert registry.ended_workloads() == []


def test_records_and_logs_are_bounded(registry: Registry) -> None:
    long = b"first\n" + b"x" * endings.MAX_LOG
    for number in range(endings.MAX_RECORDS + 3):
        register(registry, f"web-{number}", long)
        registry.entries()
    names = {record.name for record in registry.ended_workloads()}
    assert names == {f"web-{number}" for number in range(3, endings.MAX_RECORDS + 3)}
    assert len(pageferry.logs("web-3")) == endings.MAX_LOG


def test_record_of_a_full_or_unusable_folder_is_omitted(registry: Registry) -> None:
    register(registry, "web", b"lost")
    (registry.path / ".ended").write_text("not a directory")
    assert registry.entries() == {}
    assert registry.ended_workloads() == []


def test_removed_log_is_gone(registry: Registry) -> None:
    register(registry, "web", b"words")
    assert main(["logs", "web", "--remove"]) == 0
    assert main(["logs", "web", "--remove"]) == NoSuchWorkload.exit_code
    assert registry.ended_workloads() == []


def test_log_of_a_running_guest_is_not_removed(registry: Registry) -> None:
    register(registry, "web", b"words", running=True)
    with pytest.raises(UsageError, match="the workload is running"):
        logs.forget("web")
    assert pageferry.logs("web") == "words"


def test_guest_without_a_log_is_an_error(registry: Registry) -> None:
    register(registry, "web", running=True)
    with pytest.raises(UnsupportedError, match="use --detach to write a log"):
        pageferry.logs("web")
    with pytest.raises(NoSuchWorkload, match="list --all"):
        pageferry.logs("none")


@pytest.mark.parametrize("ended", ["", "\n"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 1000])
@pytest.mark.parametrize("size", [1, 40_000])
def test_last_lines_of_a_log_are_printed(registry: Registry, count: int, size: int, ended: str) -> None:
    lines = [letter * size for letter in "abc"]
    register(registry, "web", ("\n".join(lines) + ended).encode(), running=True)
    expected = "\n".join(lines[-count:]) + ended if count else ""
    assert pageferry.logs("web", lines=count) == expected


def test_followed_log_ends_with_the_guest(registry: Registry) -> None:
    child = subprocess.Popen(["sleep", "60"])
    folder = registry.claim("web")
    (folder.path / "log").write_bytes(b"one\ntwo\n")
    folder.publish(QemuEntry(**identify(child.pid), qmp_socket="/nowhere"))

    async def followed() -> bytes:
        found = b""
        async for data in logs.follow("web", LogOptions(lines=1)):
            found += data
            if found == b"two\n":
                with (folder.path / "log").open("ab") as file:
                    file.write(b"three\n")
            elif found.endswith(b"three\n"):
                child.kill()
                child.wait()
        return found

    assert asyncio.run(followed()) == b"two\nthree\n"


def test_log_is_written_unchanged_to_a_pipe_and_as_json(
    registry: Registry, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    register(registry, "web", b"\x1b[31mred\xff\n")
    assert main(["logs", "web"]) == 0
    assert capsysbinary.readouterr().out == b"\x1b[31mred\xff\n"
    for option in ([], ["--follow"]):
        assert main(["logs", "web", "--output", "json", *option]) == 0
        found = json.loads(capsysbinary.readouterr().out)
        assert found == {"type": "guest-log", "workload": "web", "text": "\x1b[31mred\ufffd\n"}


def test_all_workloads_include_those_that_have_ended(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    register(registry, "crashed", b"one\nlast words\n\n")
    folder = register(registry, "failed", running=True)
    folder.release(endings.now("failed", "qemu", 4711, "exited", exact=True, code=-11))
    assert main(["list"]) == 0
    assert "crashed" not in capsys.readouterr().out
    assert main(["list", "--all"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "crashed: exited, with an unknown code, before " in output
    assert "its last line: last words" in output
    assert "failed: killed by SIGSEGV at " in output
    assert main(["list", "--all", "--output", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["name"], one["signal"], one["exit-code"], one["log"]) for one in lines] == [
        ("failed", "SIGSEGV", None, False),
        ("crashed", None, None, True),
    ]
