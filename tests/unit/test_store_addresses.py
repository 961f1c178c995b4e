"""URLs of stores and images."""

from __future__ import annotations

from pathlib import Path

import pytest

import pageferry
from pageferry.errors import UnsupportedError, UsageError
from pageferry.stores.address import image_url, is_url, store_url


@pytest.mark.parametrize(
    ("text", "store", "name"),
    [
        ("s3://bucket/day", "s3://bucket", "day"),
        ("s3://bucket/a/b/day-1.img", "s3://bucket/a/b", "day-1.img"),
        ("file:///srv/images/day", "file:///srv/images", "day"),
        ("https://host:8080/x/day", "https://host:8080/x", "day"),
        ("az://container/day", "az://container", "day"),
    ],
)
def test_image_urls_consist_of_a_store_and_a_name(text: str, store: str, name: str) -> None:
    found = image_url("url", text)
    assert (str(found.store), found.name, str(found)) == (store, name, text)


def test_image_urls_can_name_a_manifest() -> None:
    digest = "0123456789abcdef" * 4
    found = image_url("url", f"s3://bucket/a@b/day@{digest}")
    assert (found.name, found.manifest, str(found)) == ("day", digest, "s3://bucket/a@b/day")
    assert image_url("url", f"s3://bucket/day@{digest[1:]}").name == f"day@{digest[1:]}"
    assert image_url("url", "s3://bucket/day@home").manifest is None
    with pytest.raises(UsageError, match="ends with the digest of a manifest"):
        image_url("url", "s3://bucket/", f"day@{digest}")


def test_name_of_the_file_is_the_default() -> None:
    assert image_url("url", "s3://bucket/a/", "web.img").name == "web.img"
    with pytest.raises(UsageError, match="invalid image name ''"):
        image_url("url", "s3://bucket/a/")
    with pytest.raises(UsageError, match="invalid image name 'a b'"):
        image_url("url", "s3://bucket/a/", "a b")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("bucket/day", "expected the URL"),
        ("s3://day", "expected the URL of an image"),
        ("ftp://host/day", "unsupported scheme ftp"),
        ("s3:///a/day", "the bucket or host is missing"),
        ("s3://key:secret@bucket/day", "without credentials"),
        ("https://host/a?x=1/day", "without credentials, [?]"),
        ("file://host/srv/day", "an absolute path"),
        ("s3://bucket/.hidden", "invalid image name"),
        ("s3://bucket/" + "x" * 201, "invalid image name"),
        ("s3://bucket/a\n/day", "expected the URL of a store"),
    ],
)
def test_invalid_urls_are_refused(text: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        image_url("url", text)


def test_paths_are_not_urls(tmp_path: Path) -> None:
    assert not is_url(tmp_path)
    assert not is_url(str(tmp_path))
    assert is_url("s3://bucket/x")
    assert store_url("url", "s3://bucket/x/").text == "s3://bucket/x"


def test_read_only_stores_are_refused_for_uploads(tmp_path: Path) -> None:
    for call in (
        lambda: pageferry.push_image(tmp_path / "x", "https://host/x"),
        lambda: pageferry.delete_image("https://host/x"),
        lambda: pageferry.collect_garbage("https://host/x"),
    ):
        with pytest.raises(UsageError, match="https is read-only"):
            call()
    with pytest.raises(UsageError, match="has no listings"):
        pageferry.list_images("https://host/x")


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(UnsupportedError, match=r"obstore is missing; pip install 'pageferry\[stores\]'"):
        pageferry.pull_image(f"file://{tmp_path}/x", tmp_path / "x")
