"""Fixtures of tests with a store: an S3 server of another project, and a proxy that injects faults."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from pageferry.stores.address import store_url
from pageferry.stores.store import KINDS, Store
from tests.stores.fault_proxy import FaultProxy, fault_proxy
from tests.stores.s3_server import create_bucket, s3_server

URL = "s3://images/fleet"
"""Store of these tests."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Run an S3 server, and yield its URL."""
    pytest.importorskip("moto", reason="the S3 server of the package moto is not installed")
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Run a proxy in front of the server, which the environment names as the endpoint of S3. The bucket is empty."""
    with fault_proxy(server) as proxy:
        for name, value in (("ENDPOINT_URL", proxy.url), ("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        create_bucket(server, "images")
        yield proxy
        proxy.gone, proxy.delay, proxy.pack_delay = False, 0.0, 0.0
        proxy.faults.clear()
        asyncio.run(_empty())


async def _empty() -> None:
    opened = Store(store_url("url", URL))
    for kind in KINDS:
        for entry in await opened.list(kind):
            await opened.delete(entry.key)
