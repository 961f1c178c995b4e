"""Check of a store: whether the credentials in the environment permit what images need.

The check writes one small object with the prefix `checks/`, and deletes it. Garbage collections delete the objects of
checks that were killed.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from datetime import timedelta

from pageferry.errors import ImageError, StoreError
from pageferry.stores.address import StoreUrl
from pageferry.stores.events import StoreCheck, StoreStep
from pageferry.stores.store import Store

RETRY_TIMEOUT = timedelta(seconds=10)
"""Maximum time during which a failed request is repeated."""
_PERMISSIONS = {
    "list": {"s3": "s3:ListBucket", "gs": "storage.objects.list", "az": "Storage Blob Data Contributor"},
    "create": {"s3": "s3:PutObject", "gs": "storage.objects.create", "az": "Storage Blob Data Contributor"},
    "read": {"s3": "s3:GetObject", "gs": "storage.objects.get", "az": "Storage Blob Data Contributor"},
    "delete": {"s3": "s3:DeleteObject", "gs": "storage.objects.delete", "az": "Storage Blob Data Contributor"},
}
"""Permission that each step requires, by scheme."""
_CONTENTS = bytes(range(64))


class _Failed(Exception):
    """A step has failed for a reason other than an error of the store: cause and remedy."""


async def check_store(url: StoreUrl) -> StoreCheck:
    """Try each operation that images need, until one fails. Raises UsageError, UnsupportedError."""
    steps: list[StoreStep] = []
    try:
        store = Store(url, retry_timeout=RETRY_TIMEOUT)
    except StoreError as error:
        remedy = "create the directory" if url.folder is not None else "correct the variables (docs/stores.md)"
        return _result(url, [StoreStep(name="open", passed=False, detail=str(error), remedy=remedy)])
    steps.append(StoreStep(name="open", passed=True, detail="the configuration is valid"))
    key = f"checks/{os.urandom(16).hex()}"
    calls = _writable(store, key) if url.writable else [("read", lambda: _reach(store))]
    for name, call in calls:
        try:
            steps.append(StoreStep(name=name, passed=True, detail=await call()))
        except _Failed as failed:
            detail, remedy = failed.args
            steps.append(StoreStep(name=name, passed=False, detail=detail, remedy=remedy))
        except (StoreError, ImageError) as error:
            steps.append(StoreStep(name=name, passed=False, detail=str(error), remedy=_remedy(url, name, error)))
        if not steps[-1].passed and name != "refuse":
            break
    return _result(url, steps)


def _result(url: StoreUrl, steps: list[StoreStep]) -> StoreCheck:
    failed = next((step for step in steps if not step.passed), None)
    reason = None if failed is None else f"{failed.detail}; {failed.remedy}"
    return StoreCheck(store=str(url), steps=steps, usable=failed is None, reason=reason)


def _remedy(url: StoreUrl, name: str, error: Exception) -> str:
    if url.folder is not None:
        return f"permit this user to write to {url.folder}"
    if "permission denied" not in str(error):
        return "check the URL, the variables with the endpoint and the region, and the network (docs/stores.md)"
    permission = _PERMISSIONS.get(name, {}).get(url.scheme)
    return f"grant {permission}, or use other credentials" if permission else "use other credentials"


def _writable(store: Store, key: str) -> list[tuple[str, Callable[[], Awaitable[str]]]]:
    """Return the steps of the check of a store that can be written to."""

    async def list_images() -> str:
        return f"{len(await store.list('images'))} images"

    async def create() -> str:
        await store.create(key, _CONTENTS)
        return f"created {key}"

    async def refuse() -> str:
        if await store.create(key, _CONTENTS):
            raise _Failed(
                "the server has replaced an object although the request forbids it (If-None-Match)",
                "use a server that supports conditional writes, such as Amazon S3, MinIO or Ceph",
            )
        return "an existing object is not replaced"

    async def read() -> str:
        if await store.get_range(key, 16, 32) != _CONTENTS[16:48]:
            raise _Failed("a range of an object has wrong contents", "use a server that supports ranges")
        return "a range of an object is read"

    async def delete() -> str:
        await store.delete(key)
        return f"deleted {key}"

    return [("list", list_images), ("create", create), ("refuse", refuse), ("read", read), ("delete", delete)]


async def _reach(store: Store) -> str:
    await store.find("images/none")
    return "the server replies"
