"""Pager of a base: its exit, and the image that it has opened."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from pageferry._engine import Space
from pageferry.errors import ImageError, RestoreError
from pageferry.host import proc
from pageferry.host.registry import Registry
from pageferry.host.smaps import smaps
from pageferry.images.image import ImageFile
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import base_records, base_service, orders
from pageferry.pager.base_records import BaseFolder, CloneFile, CloneRecord
from pageferry.pager.base_service import BaseService
from pageferry.pager.process import Session, serve_base
from pageferry.pager.records import RegionRecord
from tests.kernel.images import Maker

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return Maker(512).write(tmp_path / "image")


@pytest.fixture
def service(image: Path, tmp_path: Path) -> Iterator[BaseService]:
    """Yield the pager of a base, with one client."""
    made = BaseService(ImageFile(image), Registry(tmp_path / "run"), serve_base)
    yield made
    os.close(made.descriptor)


def test_exiting_pager_accepts_no_client(service: BaseService) -> None:
    path = service.folder.socket
    assert not service._is_unused()
    service.end_session()
    assert service._is_unused()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(path)
        assert client.recv(1) == b""
    service.run()
    assert not service.folder.path.exists()


def test_clone_that_has_exited_before_it_is_added_does_not_keep_the_pager(
    service: BaseService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            userfault = Space(process.pid).missing_faults().descriptor
            record = CloneRecord(image="", identity=service.image.identity, pid=process.pid, regions=[])
            with monkeypatch.context() as exited:
                exited.setattr(proc, "start_time", lambda _: None)
                service._add(CloneFile("exited", tmp_path / "record", record), userfault)
            os.close(userfault)
        finally:
            process.kill()
    service.end_session()
    assert service._is_unused()
    service.run()


def joining(service: BaseService, pid: int) -> orders.Join:
    """Return the order by which a program joins the pager, for all pages of the base."""
    regions = [RegionRecord("arena", service.image.pages * SMALL_PAGE, 0, SMALL_PAGE, [])]
    record = CloneRecord(image="/image", identity=service.image.identity, pid=pid, regions=regions)
    return orders.Join(name="process-1", work=msgspec.structs.replace(record, started=proc.start_time(pid) or 0))


def end(service: BaseService) -> None:
    """End the session of the only client, and run the pager until it exits."""
    service.end_session()
    service.run()


def test_program_that_sends_the_record_of_another_process_is_refused(service: BaseService) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        session = Session(theirs, service)
        for pid, kind in ((os.getppid(), orders.Failed), (os.getpid(), orders.Joined)):
            orders.send(ours, joining(service, pid))
            assert session._next()
            assert isinstance(orders.receive_reply(ours), kind)
            assert bool(list(service.folder.programs())) == (kind is orders.Joined)
    service.forget_program("process-1")
    end(service)


def test_program_that_has_left_before_it_was_served_leaves_no_record(service: BaseService) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            orders.send(ours, joining(service, os.getpid()))
        assert not Session(theirs, service)._next()
    assert not list(service.folder.programs())
    end(service)


def test_program_that_cannot_be_served_leaves_no_record(service: BaseService, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("cannot wait for the process")

    with monkeypatch.context() as failing:
        failing.setattr(service, "_add", fail)
        with pytest.raises(OSError, match="cannot wait"):
            service.join("process-1", joining(service, os.getpid()).work)
    assert not list(service.folder.programs())
    end(service)


def test_repeated_load_of_damaged_contents_starts_no_further_threads(image: Path, tmp_path: Path) -> None:
    with open(image, "r+b") as file:
        file.seek(image.stat().st_size // 2)
        file.write(bytes(4096))
    service = BaseService(ImageFile(image), Registry(tmp_path / "run"), serve_base)

    def load() -> int:
        """Return the number of mappings of 2 MiB, such as stacks of threads that have not been joined."""
        with pytest.raises(ImageError, match="cannot read bytes"):
            service.ensure(0, service.image.pages * SMALL_PAGE, "/image")
        return sum(one.mapping.end - one.mapping.address == 2 << 20 for one in smaps(os.getpid()))

    before = load()
    for _ in range(100):
        after = load()
    assert after - before < 50
    end(service)
    os.close(service.descriptor)


def test_pager_that_cannot_start_leaves_nothing_behind(image: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "run")
    with patch.object(base_service, "_new_file", side_effect=OSError("no memory")), pytest.raises(OSError, match="no"):
        BaseService(ImageFile(image), registry, serve_base)
    assert not base_records.base_folders(registry)
    service = BaseService(ImageFile(image), registry, serve_base)
    end(service)
    os.close(service.descriptor)


def test_image_that_was_replaced_is_refused(service: BaseService, image: Path, tmp_path: Path) -> None:
    service.check_image(str(image))
    opened = base_records.image_stat(image)
    os.replace(Maker(512, seed=2).write(tmp_path / "new"), image)
    with pytest.raises(RestoreError, match="the image was replaced"):
        service.check_image(str(image))
    record = BaseFolder.of(Registry(tmp_path / "run"), service.image.identity).load()
    assert record is not None
    assert record.stat == opened
    service.end_session()
    service.run()
