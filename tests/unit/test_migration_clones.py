"""Migration of clones: the reference to an image in messages, the search for it, and options."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import pytest

from pageferry.cli.syntax.receive import ReceiveOptions
from pageferry.errors import ProtocolError, UnsupportedError, UsageError
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.images.metadata import ImageIdentity
from pageferry.memory.regions import Identity
from pageferry.migration.clone_destination import choose_base
from pageferry.migration.clone_reference import base_detail, base_of
from pageferry.migration.incoming import BaseChoice, ReceivingHost
from pageferry.migration.ownership import CommitDecisions
from pageferry.migration.transport import messages
from pageferry.pager import page_faults
from pageferry.workloads.protocols import BASE, BASE_REQUIRED, Migratable
from tests.kernel.images import Maker

IDENTITY = ImageIdentity(id="0123456789abcdef" * 2, digest="fedcba9876543210")


class Waiting:
    """Workload that waits for its source, and could share the memory of an image."""

    name, pid, regions = "waiting", os.getpid(), ()
    identity = Identity("qemu", "waiting")

    async def share_base(self, *_: object) -> None:
        pass


class Alone:
    """Workload that cannot share the memory of an image."""

    name, pid, regions = "alone", os.getpid(), ()
    identity = Identity("arena", "alone")


def hello(**details: Any) -> messages.Hello:
    return messages.Hello(
        version=messages.VERSION,
        migration="0" * 32,
        kind="qemu",
        name="web",
        details=details,
        regions=[messages.RegionInfo(name="ram", length=4096, page_size=4096)],
        streams=1,
        codec="none",
        populate="none",
        keep_large=False,
        mode="precopy",
    )


def choose(folder: Path, found: messages.Hello, workload: object | None = None, **options: Any) -> BaseChoice | None:
    """Return the choice of a receiver with an empty run directory."""
    registry = Registry(folder / "run")
    host = ReceivingHost(decisions=CommitDecisions(registry.path), registry=registry, **options)
    return asyncio.run(choose_base(found, cast(Migratable, workload or Waiting()), host))


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(page_faults, "check", lambda _pids: None)
    (tmp_path / "images").mkdir()
    return Maker(8).write(tmp_path / "images" / "web.img")


def test_reference_to_an_image_round_trips() -> None:
    assert base_of(base_detail(IDENTITY)) == IDENTITY
    assert base_of({"qemu": "7.2"}) is None


@pytest.mark.parametrize(
    "reference",
    [
        "",
        ":",
        IDENTITY.id,
        f"{IDENTITY.id}:",
        f"{IDENTITY.id}:{IDENTITY.digest}\n",
        f"x{IDENTITY.id}:{IDENTITY.digest}",
        f"{IDENTITY.id.upper()}:{IDENTITY.digest}",
        f"{IDENTITY.id}:{IDENTITY.digest}0",
        "../" * 20,
        7,
        True,
    ],
)
def test_invalid_reference_to_an_image_is_refused(reference: str | int | bool, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="invalid detail base"):
        choose(tmp_path, hello(**{BASE: reference}))


@pytest.mark.parametrize("mode", ["postcopy", "hybrid"])
def test_clone_is_received_in_precopy_mode_only(mode: Literal["postcopy", "hybrid"], tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=f"cannot receive web in {mode} mode"):
        choose(tmp_path, msgspec.structs.replace(hello(**base_detail(IDENTITY)), mode=mode))


def test_reason_of_a_destination_is_bounded() -> None:
    token = bytes(messages.TOKEN_BYTES)
    longest = messages.Welcome(token=token, base_note="x" * messages.MAX_NOTE)
    assert messages.decode(messages.encode(longest)[4:]) == longest
    with pytest.raises(ValueError, match="base_note"):
        messages.decode(messages.encode(messages.Welcome(token=token, base_note="x" * (messages.MAX_NOTE + 1)))[4:])


def test_welcome_without_a_base_is_understood_by_older_releases() -> None:
    encoded = messages.encode(messages.Welcome(token=bytes(messages.TOKEN_BYTES)))
    assert b"base" not in encoded


def test_image_is_found_by_its_identity_and_not_by_its_name(image: Path, tmp_path: Path) -> None:
    wanted = hello(**base_detail(ImageFile(image).identity))
    other = tmp_path / "other"
    other.mkdir()
    Maker(8, seed=2).write(other / image.name)
    (other / "notes").write_text("no image")
    (other / "folder").mkdir()
    refused = choose(tmp_path, wanted, bases=[other, other / image.name])
    assert refused is not None
    assert refused.image is None
    assert "no image on this host has the id" in refused.note
    image.rename(other / "renamed")
    for bases in ([other], [other / "notes", other / "renamed"]):
        found = choose(tmp_path, wanted, bases=bases)
        assert found == BaseChoice(ImageFile(other / "renamed").identity, other / "renamed")


def test_required_base_that_is_missing_is_refused(image: Path, tmp_path: Path) -> None:
    missing = base_detail(IDENTITY)
    with pytest.raises(UnsupportedError, match="cannot share memory with web at the destination: no image"):
        choose(tmp_path, hello(**missing, **{BASE_REQUIRED: True}), bases=[image])
    with pytest.raises(UnsupportedError, match="cannot share memory with web at the destination: no image"):
        choose(tmp_path, hello(**missing), bases=[image], memory="shared")
    with pytest.raises(UnsupportedError, match="does not name an image"):
        choose(tmp_path, hello(), bases=[image], memory="shared")
    assert choose(tmp_path, hello(), bases=[image]) is None


def test_reason_for_separate_memory_names_its_cause(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = hello(**base_detail(ImageFile(image).identity))

    def refuse(_pids: object) -> None:
        raise page_faults.CannotHandleFaults("page faults of process 7 cannot be handled")

    def note(workload: object, **options: Any) -> str:
        chosen = choose(tmp_path, wanted, workload, bases=[image], **options)
        assert chosen is not None
        assert chosen.image is None
        return chosen.note

    assert note(Waiting(), memory="own") == "the receiver was started with --memory own"
    assert note(Alone()) == "a workload of kind arena cannot share the memory of an image"
    monkeypatch.setattr(page_faults, "check", refuse)
    assert note(Waiting()) == "page faults of process 7 cannot be handled"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "shared", "hugetlb": True}, "`hugetlb` cannot be combined"),
        ({"memory": "own", "base": ("image",)}, "`base` cannot be combined"),
        ({"memory": "other"}, "memory"),
    ],
)
def test_contradictory_options_of_a_receiver_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ReceiveOptions(**options)
