"""Images in an S3 store of another project, directly and through a proxy that injects faults."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.cli.main import main
from pageferry.errors import ImageError, StoreError
from pageferry.stores import pull, store
from pageferry.stores.address import store_url
from tests.kernel.conftest import URL
from tests.stores.fault_proxy import FaultProxy


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image with 4 MiB of random memory."""
    arena = pageferry.Arena(4 << 20)
    np.frombuffer(memoryview(arena), "u8")[:] = np.random.default_rng(2).integers(0, 1 << 63, 1 << 19, dtype="u8")
    path = tmp_path_factory.mktemp("image") / "image"
    pageferry.checkpoint(arena, path)
    return path


def test_image_is_pushed_listed_pulled_and_collected(proxy: FaultProxy, image: Path, tmp_path: Path) -> None:
    pushed = pageferry.push_image(image, f"{URL}/")
    assert pushed.url == f"{URL}/image"
    (listed,) = pageferry.list_images(URL).images
    assert (listed.name, listed.manifest, listed.length) == ("image", pushed.manifest, image.stat().st_size)
    proxy.requests.clear()
    pulled = pageferry.pull_image(f"{URL}/image", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert pulled.downloaded < 1.1 * pushed.uploaded
    assert len(proxy.requests) == 3  # reference, manifest, pack
    pageferry.delete_image(f"{URL}/image")
    assert pageferry.collect_garbage(URL).kept == 2
    assert pageferry.list_images(URL).images == []


@pytest.mark.parametrize("action", ["busy", "reset", "lost"])
@pytest.mark.parametrize("key", ["packs/", "manifests/", "images/"])
def test_failed_uploads_are_repeated(proxy: FaultProxy, image: Path, tmp_path: Path, action: Any, key: str) -> None:
    proxy.inject("PUT", f"fleet/{key}", action)
    pushed = pageferry.push_image(image, f"{URL}/a")
    assert not pushed.existed
    sent = sum(f"PUT /images/fleet/{key}" in request for request in proxy.requests)
    assert sent == (1 if (action, key) == ("lost", "images/") else 2)
    pageferry.pull_image(f"{URL}/a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("action", ["busy", "reset", "cut", "short", "corrupt"])
def test_failed_downloads_are_repeated(proxy: FaultProxy, image: Path, tmp_path: Path, action: Any) -> None:
    pageferry.push_image(image, f"{URL}/a")
    proxy.inject("GET", "packs/", action)
    pageferry.pull_image(f"{URL}/a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("action", ["short", "corrupt"])
@pytest.mark.parametrize("key", ["packs/", "manifests/"])
def test_wrong_contents_are_reported(proxy: FaultProxy, image: Path, tmp_path: Path, action: Any, key: str) -> None:
    pageferry.push_image(image, f"{URL}/a")
    proxy.inject("GET", f"fleet/{key}", action, 1000)
    with pytest.raises((ImageError, StoreError), match=key):
        pageferry.pull_image(f"{URL}/a", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_store_that_stays_busy_is_reported(proxy: FaultProxy, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_RETRIES", 2)
    proxy.inject("PUT", "packs/", "busy", 1000)
    with pytest.raises(StoreError, match="cannot write packs/"):
        pageferry.push_image(image, f"{URL}/a")
    assert pageferry.list_images(URL).images == []


def test_second_image_of_a_name_is_refused_while_both_are_uploaded(
    proxy: FaultProxy, image: Path, tmp_path: Path
) -> None:
    pageferry.flatten_image(image, tmp_path / "other")

    async def both() -> list[Any]:
        pushes = [pageferry.push_image_async(path, f"{URL}/a") for path in (image, tmp_path / "other")]
        return await asyncio.gather(*pushes, return_exceptions=True)

    results = asyncio.run(both())
    assert sum(isinstance(one, ImageError) for one in results) == 1
    winner = image if isinstance(results[1], ImageError) else tmp_path / "other"
    pageferry.pull_image(f"{URL}/a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == winner.read_bytes()


def test_image_can_be_read_over_plain_http(proxy: FaultProxy, image: Path, tmp_path: Path) -> None:
    pageferry.push_image(image, f"{URL}/a")
    pageferry.pull_image(f"{proxy.url}/images/fleet/a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_large_image_is_read_in_bounded_ranges(proxy: FaultProxy, image: Path, tmp_path: Path) -> None:
    pageferry.push_image(image, f"{URL}/a")
    proxy.requests.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pull, "RANGE", 1 << 20)
        pulled = pageferry.pull_image(f"{URL}/a", tmp_path / "copy")
    assert pulled.requests == sum("packs/" in request for request in proxy.requests) > 3
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_wrong_credentials_and_missing_buckets_are_named(proxy: FaultProxy, image: Path, tmp_path: Path) -> None:
    with pytest.raises((ImageError, StoreError), match="s3://none/fleet"):
        pageferry.pull_image("s3://none/fleet/a", tmp_path / "copy")
    with pytest.raises(StoreError, match="cannot list images in s3://none/fleet"):
        pageferry.list_images("s3://none/fleet")


def test_encrypted_image_is_pushed_pulled_and_restored(
    proxy: FaultProxy, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyrage", reason="the extra `stores` is not installed")
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    pushed = pageferry.push_image(image, f"{URL}/a", key=key)
    proxy.requests.clear()
    pageferry.pull_image(f"{URL}/a@{pushed.manifest}", tmp_path / "copy", key=key)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert len(proxy.requests) == 3  # as for an image that is not encrypted: reference, manifest, pack
    pageferry.restore(f"{URL}/a", key=key).load()
    proxy.requests.clear()
    pageferry.restore(f"{URL}/a", key=key).load()
    assert len(proxy.requests) == 2  # from the cache: reference and manifest, which the key must open
    proxy.inject("GET", "packs/", "corrupt", 1000)
    with pytest.raises(ImageError, match="does not match its digest"):
        pageferry.pull_image(f"{URL}/a", tmp_path / "again", key=key)
    assert not (tmp_path / "again").exists()


def test_check_tries_each_permission_and_leaves_nothing(proxy: FaultProxy, capsys: pytest.CaptureFixture[str]) -> None:
    found = pageferry.check_store(URL)
    assert [step.name for step in found.steps] == ["open", "list", "create", "refuse", "read", "delete"]
    assert (found.usable, found.reason) == (True, None)
    assert main(["check", "--store", URL]) == 0
    assert "usable" in capsys.readouterr().out
    assert asyncio.run(store.Store(store_url("url", URL)).list("checks")) == []


@pytest.mark.parametrize(
    ("method", "path", "step"),
    [
        ("GET", "list-type", "list"),
        ("PUT", "checks/", "create"),
        ("GET", "checks/", "read"),
        ("POST", "delete", "delete"),
        ("DELETE", "checks/", "delete"),
    ],
)
def test_check_names_the_permission_that_is_missing(
    proxy: FaultProxy, capsys: pytest.CaptureFixture[str], method: str, path: str, step: str
) -> None:
    proxy.inject(method, path, "denied", 100)
    found = pageferry.check_store(URL)
    if found.usable:
        assert step == "delete"  # the client uses the other request to delete
        return
    assert (found.steps[-1].name, found.steps[-1].passed) == (step, False)
    assert "permission denied" in found.steps[-1].detail
    assert "grant s3:" in found.steps[-1].remedy
    proxy.inject(method, path, "denied", 100)
    assert main(["check", "--store", URL]) == StoreError.exit_code
    assert "grant s3:" in capsys.readouterr().err


def test_check_finds_a_server_that_ignores_conditions(proxy: FaultProxy) -> None:
    proxy.ignores_conditions = True
    found = pageferry.check_store(URL)
    assert [step.name for step in found.steps if not step.passed] == ["refuse"]
    assert "conditional writes" in (found.reason or "")


def test_check_names_a_directory_that_is_missing(tmp_path: Path) -> None:
    found = pageferry.check_store(f"file://{tmp_path}/none")
    assert (found.steps[-1].name, found.steps[-1].remedy) == ("open", "create the directory")
