"""Fixtures of tests with a store in an S3 bucket, which is empty at the beginning of each test."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from pageferry.stores.address import store_url
from pageferry.stores.store import KINDS, Store
from tests.stores.fault_proxy import FaultProxy
from tests.stores.fixtures import proxied, server

__all__ = ["server"]

URL = "s3://images/fleet"
"""Store of these tests."""


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Run a proxy in front of the server. The bucket is empty."""
    with proxied(server, "images", monkeypatch) as proxy:
        yield proxy
        proxy.gone, proxy.delay, proxy.pack_delay = False, 0.0, 0.0
        proxy.faults.clear()
        asyncio.run(_empty())


async def _empty() -> None:
    opened = Store(store_url("url", URL))
    for kind in KINDS:
        for entry in await opened.list(kind):
            await opened.delete(entry.key)
