"""Tests of the registry: names, claims, stale entries, records."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from pageferry.errors import NameInUse, NoSuchWorkload, UsageError, WorkloadError
from pageferry.host import proc
from pageferry.host.registry import ArenaEntry, Claim, Folder, QemuEntry, Registry, default_run_directory, identify
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.folders import folder_of

WORKLOAD_FILE = "workload.json"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "run")


def entry_of_ours() -> QemuEntry:
    return QemuEntry(**identify(os.getpid()), qmp_socket="/nowhere")


def entry_of_the_dead() -> QemuEntry:
    """Return an entry with the pid of this process, but another start time, as if the pid had been reused."""
    return msgspec.structs.replace(entry_of_ours(), started=1)


@pytest.mark.parametrize("name", ["", ".", "..", ".ram", "-x", "a/b", "a b", "x" * 65, "ä", "a\n"])
def test_invalid_names_are_refused(registry: Registry, name: str) -> None:
    for call in (registry.claim, registry.lookup, registry.remove):
        with pytest.raises(UsageError, match="invalid workload name"):
            call(name)
    assert not registry.path.exists()


@pytest.mark.parametrize("name", ["a", "web-1", "7", "A.b_c", "x" * 64])
def test_valid_names_are_accepted(registry: Registry, name: str) -> None:
    registry.claim(name).publish(entry_of_ours())
    assert registry.lookup(name) == entry_of_ours()


def test_claimed_name_is_in_use_but_not_listed(registry: Registry) -> None:
    registry.claim("web")
    with pytest.raises(NameInUse, match=f"it is being started by process {os.getpid()}"):
        registry.claim("web")
    assert isinstance(registry.lookup("web"), Claim)
    assert registry.entries() == {}


def test_released_name_is_free_again(registry: Registry) -> None:
    folder = registry.claim("web")
    folder.store("record.json", entry_of_ours())
    folder.release()
    assert not folder.path.exists()
    registry.claim("web")


def test_entries_of_all_kinds_round_trip(registry: Registry) -> None:
    guest = entry_of_ours()
    arena = ArenaEntry(**identify(os.getpid()), control_socket="/somewhere")
    registry.claim("guest").publish(guest)
    registry.claim("arena").publish(arena)
    assert Registry(registry.path).entries() == {"arena": arena, "guest": guest}


def test_stale_entry_is_pruned_with_its_folder(registry: Registry) -> None:
    folder = registry.claim("web")
    folder.publish(entry_of_the_dead())
    (folder.path / "qmp.sock").touch()
    with pytest.raises(NoSuchWorkload):
        registry.lookup("web")
    assert not folder.path.exists()

    registry.claim("web").publish(entry_of_the_dead())
    assert registry.entries() == {}
    registry.claim("web").publish(entry_of_the_dead())
    registry.claim("web")


def test_claim_of_an_exited_process_is_pruned(registry: Registry) -> None:
    code = "import sys; from pathlib import Path; from pageferry.host.registry import Registry as R; "
    code += "R(Path(sys.argv[1])).claim('web')"
    subprocess.run([sys.executable, "-c", code, str(registry.path)], check=True)
    assert (registry.path / "web" / WORKLOAD_FILE).exists()
    registry.claim("web")


def test_zombie_counts_as_exited() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        started = proc.start_time(child.pid)
        assert started is not None
        assert proc.is_alive(child.pid, started)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not proc.is_alive(child.pid, started)


# -- entries whose process cannot be checked


def other_namespace() -> QemuEntry:
    return msgspec.structs.replace(entry_of_the_dead(), namespace="pid:[1],time:[1]")


def test_entry_of_another_namespace_is_kept_and_not_opened(registry: Registry) -> None:
    folder = registry.claim("web")
    folder.publish(other_namespace())
    folder.store("record.json", Note("kept"))
    assert registry.entries() == {"web": other_namespace()}
    with pytest.raises(
        WorkloadError, match=f"started in another PID namespace.* remove {folder.path} if it has exited"
    ):
        registry.lookup("web")
    with pytest.raises(NameInUse, match="started in another PID namespace"):
        registry.claim("web")
    assert folder.load("record.json", Note) == Note("kept")


def test_entry_of_an_earlier_boot_is_pruned(registry: Registry) -> None:
    folder = registry.claim("web")
    folder.publish(msgspec.structs.replace(entry_of_ours(), boot="another"))
    assert registry.entries() == {}
    assert not folder.path.exists()


@pytest.mark.parametrize("namespace", ["", "pid:[1],time:[1]"])
@pytest.mark.parametrize("age", [0, 1000])
def test_entry_that_cannot_be_judged_is_pruned_once_its_socket_is_abandoned(
    registry: Registry, tmp_path: Path, namespace: str, age: int
) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.utime(path, (time.time() - age, time.time() - age))
        listener.listen()
        folder = registry.claim("web")
        folder.publish(msgspec.structs.replace(entry_of_the_dead(), qmp_socket=path, namespace=namespace))
        assert list(registry.entries()) == ["web"]
    assert list(registry.entries()) == ([] if age else ["web"])
    assert folder.path.exists() == (age == 0)


def test_entry_of_an_older_version_is_read(registry: Registry) -> None:
    """Entries of older versions contain neither a boot ID nor a namespace."""
    path = registry.claim("web").path / WORKLOAD_FILE
    entry = entry_of_ours()
    path.write_text(f'{{"kind":"qemu","pid":{entry.pid},"started":{entry.started},"qmp_socket":"/x","version":1}}')
    found = registry.lookup("web")
    assert (found.pid, found.alive) == (os.getpid(), True)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("options", [("--mount-proc",), ()])
def test_command_in_another_pid_namespace_deletes_nothing(registry: Registry, options: tuple[str, ...]) -> None:
    folder = registry.claim("web")
    folder.publish(entry_of_ours())
    folder.store("record.json", Note("kept"))
    program = "from pathlib import Path; from pageferry.host.registry import Registry; import sys; "
    program += "print(list(Registry(Path(sys.argv[1])).entries()))"
    command = ["unshare", "--pid", "--fork", *options, sys.executable, "-c", program, str(registry.path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert folder.load("record.json", Note) == Note("kept")
    assert done.stdout == "['web']\n"
    assert registry.lookup("web") == entry_of_ours()


def test_workload_whose_main_thread_has_exited_is_kept(registry: Registry) -> None:
    program = """
import ctypes, os, sys, threading, time
from pathlib import Path
from pageferry.host import proc
from pageferry.host.registry import ArenaEntry, Claim, Registry
folder = Registry(Path(sys.argv[1])).claim("web")
claim = folder.load("workload.json", Claim)
folder.publish(ArenaEntry(**{name: getattr(claim, name) for name in claim.__struct_fields__}, control_socket="/x"))
threading.Thread(target=lambda: time.sleep(60)).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)  # exits only the main thread
"""
    command = [sys.executable, "-c", program, str(registry.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            while b") Z " not in Path(f"/proc/{child.pid}/stat").read_bytes():
                pass
            assert list(registry.entries()) == ["web"]
        finally:
            child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert registry.entries() == {}


def test_only_one_of_concurrent_claims_succeeds(registry: Registry) -> None:
    barrier = threading.Barrier(8)
    outcomes: list[Folder | None] = []

    def claim() -> None:
        barrier.wait()
        try:
            outcomes.append(registry.claim("web"))
        except NameInUse:
            outcomes.append(None)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    assert sum(outcome is not None for outcome in outcomes) == 1


def test_lookup_without_a_run_directory(registry: Registry) -> None:
    with pytest.raises(NoSuchWorkload, match="no workload named web"):
        registry.lookup("web")
    assert registry.entries() == {}
    assert not registry.path.exists()


def test_entry_of_another_version_is_refused(registry: Registry) -> None:
    folder = registry.claim("web")
    folder.publish(msgspec.structs.replace(entry_of_ours(), version=99))
    with pytest.raises(WorkloadError, match="unsupported version 99"):
        registry.lookup("web")


@pytest.mark.parametrize("content", ["", "{", '{"kind":"qemu"}', '{"kind":"rocket","pid":1,"started":1}'])
def test_damaged_entry_is_named(registry: Registry, content: str) -> None:
    (registry.claim("web").path / WORKLOAD_FILE).write_text(content)
    with pytest.raises(WorkloadError, match=f"cannot read .*web/{WORKLOAD_FILE}"):
        registry.lookup("web")


class Note(msgspec.Struct, frozen=True):
    """Record with one text field, for the tests."""

    text: str


def test_records_are_replaced_atomically(registry: Registry) -> None:
    folder = registry.claim("web")
    assert folder.load("note.json", Note) is None
    folder.store("note.json", Note("one"))
    folder.store("note.json", Note("two"))
    assert folder.load("note.json", Note) == Note("two")
    assert sorted(path.name for path in folder.path.iterdir()) == ["note.json", WORKLOAD_FILE]
    folder.forget("note.json")
    folder.forget("note.json")
    assert folder.load("note.json", Note) is None


def test_damaged_record_is_named(registry: Registry) -> None:
    folder = registry.claim("web")
    (folder.path / "note.json").write_text("[]")
    with pytest.raises(WorkloadError, match=r"cannot read .*note\.json"):
        folder.load("note.json", Note)


def test_only_one_operation_per_workload_at_a_time(registry: Registry) -> None:
    folder = registry.claim("web")
    busy = pytest.raises(WorkloadError, match=f"cannot use web: migrated by.*{os.getpid()}")
    with folder.exclusively("migrated"), busy, Folder(registry, "web").exclusively("saved"):
        pass
    with folder.exclusively("saved"):
        pass


def test_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    folder = Registry(tmp_path / ("x" * 80)).claim("y" * 64)
    with pytest.raises(UsageError, match="longer than 107 bytes"):
        folder.socket_path("qmp.sock")


def test_run_directory_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFERRY_RUN_DIR", "/given")
    assert default_run_directory() == Path("/given")
    monkeypatch.delenv("PAGEFERRY_RUN_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_run_directory() == Path("/run/pageferry")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_run_directory() == Path("/run/user/1000/pageferry")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(UsageError, match="PAGEFERRY_RUN_DIR"):
        default_run_directory()


def test_unnamed_workload_has_no_folder(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unnamed workload needs no run directory. It has no folder even if a named workload has the same name."""
    monkeypatch.setenv("PAGEFERRY_RUN_DIR", str(registry.path))
    unnamed = Arena(4096).workload()
    with Arena(4096, unnamed.name, on_pause=lambda: None) as named:
        assert folder_of(unnamed) is None
        found = folder_of(named.workload())
        assert found is not None
        assert found.path == registry.path / unnamed.name
    assert folder_of(named.workload()) is None
    for variable in ("PAGEFERRY_RUN_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert folder_of(unnamed) is None
