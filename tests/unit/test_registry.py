"""The registry: names, claims, dead entries, records."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from pageferry.errors import NameInUse, NoSuchWorkload, UsageError, WorkloadError
from pageferry.host import proc
from pageferry.host.registry import ArenaEntry, Claim, Folder, QemuEntry, Registry, default_run_directory
from pageferry.workloads.arena import Arena
from pageferry.workloads.folders import folder_of

WORKLOAD_FILE = "workload.json"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "run")


def entry_of_ours() -> QemuEntry:
    started = proc.start_time(os.getpid())
    assert started is not None
    return QemuEntry(pid=os.getpid(), started=started, qmp_socket="/nowhere")


def entry_of_the_dead() -> QemuEntry:
    """A pid that was reused: ours, by a process that started at another time."""
    return QemuEntry(pid=os.getpid(), started=1, qmp_socket="/nowhere")


@pytest.mark.parametrize("name", ["", ".", "..", ".ram", "-x", "a/b", "a b", "x" * 65, "ä", "a\n"])
def test_bad_names_are_refused(registry: Registry, name: str) -> None:
    for call in (registry.claim, registry.lookup, registry.remove):
        with pytest.raises(UsageError, match="is no name for a workload"):
            call(name)
    assert not registry.path.exists()


@pytest.mark.parametrize("name", ["a", "web-1", "7", "A.b_c", "x" * 64])
def test_good_names_are_taken(registry: Registry, name: str) -> None:
    registry.claim(name).publish(entry_of_ours())
    assert registry.lookup(name) == entry_of_ours()


def test_claim_is_seen_as_in_use_and_is_not_listed(registry: Registry) -> None:
    registry.claim("web")
    with pytest.raises(NameInUse, match=f"web is being started by process {os.getpid()}"):
        registry.claim("web")
    assert isinstance(registry.lookup("web"), Claim)
    assert registry.entries() == {}


def test_released_name_is_free_again(registry: Registry) -> None:
    folder = registry.claim("web")
    folder.store("record.json", entry_of_ours())
    folder.release()
    assert not folder.path.exists()
    registry.claim("web")


def test_entries_of_all_kinds_come_back(registry: Registry) -> None:
    guest = entry_of_ours()
    arena = ArenaEntry(pid=guest.pid, started=guest.started, control_socket="/somewhere")
    registry.claim("guest").publish(guest)
    registry.claim("arena").publish(arena)
    assert Registry(registry.path).entries() == {"arena": arena, "guest": guest}


def test_dead_entry_is_pruned_with_its_folder(registry: Registry) -> None:
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


def test_claim_of_a_dead_process_is_pruned(registry: Registry) -> None:
    code = "import sys; from pathlib import Path; from pageferry.host.registry import Registry as R; "
    code += "R(Path(sys.argv[1])).claim('web')"
    subprocess.run([sys.executable, "-c", code, str(registry.path)], check=True)
    assert (registry.path / "web" / WORKLOAD_FILE).exists()
    registry.claim("web")


def test_zombie_counts_as_dead() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        started = proc.start_time(child.pid)
        assert started is not None
        assert proc.is_alive(child.pid, started)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not proc.is_alive(child.pid, started)


def test_only_one_of_many_claims_a_name(registry: Registry) -> None:
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
    with pytest.raises(WorkloadError, match="is of version 99"):
        registry.lookup("web")


@pytest.mark.parametrize("content", ["", "{", '{"kind":"qemu"}', '{"kind":"rocket","pid":1,"started":1}'])
def test_damaged_entry_is_named(registry: Registry, content: str) -> None:
    (registry.claim("web").path / WORKLOAD_FILE).write_text(content)
    with pytest.raises(WorkloadError, match=f"web/{WORKLOAD_FILE} cannot be read"):
        registry.lookup("web")


class Note(msgspec.Struct, frozen=True):
    """A record."""

    text: str


def test_records_are_replaced_whole(registry: Registry) -> None:
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
    with pytest.raises(WorkloadError, match=r"note\.json cannot be read"):
        folder.load("note.json", Note)


def test_one_works_on_a_workload_at_a_time(registry: Registry) -> None:
    folder = registry.claim("web")
    busy = pytest.raises(WorkloadError, match=f"web is busy: migrated by.*{os.getpid()}")
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


def test_a_workload_without_a_name_has_no_folder(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else is called like it; nor does it need a run directory."""
    monkeypatch.setenv("PAGEFERRY_RUN_DIR", str(registry.path))
    nameless = Arena(4096).workload()
    with Arena(4096, nameless.name, on_pause=lambda: None) as named:
        assert folder_of(nameless) is None
        found = folder_of(named.workload())
        assert found is not None
        assert found.path == registry.path / nameless.name
    assert folder_of(named.workload()) is None
    for variable in ("PAGEFERRY_RUN_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert folder_of(nameless) is None
