"""Fixtures: an S3 server with an empty bucket behind a proxy that injects faults, and an empty cache of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.fault_proxy import FaultProxy, fault_proxy
from tests.stores.s3_server import create_bucket, s3_server

URL = "s3://lazy/fleet"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Run an S3 server, and yield its URL."""
    pytest.importorskip("moto", reason="the S3 server of the package moto is not installed")
    with s3_server() as endpoint:
        create_bucket(endpoint, "lazy")
        yield endpoint


@pytest.fixture
def proxy(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Run a proxy in front of the server. The environment names it as the endpoint of S3, and an empty cache."""
    with fault_proxy(server) as proxy:
        for name, value in (("ENDPOINT_URL", proxy.url), ("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))
        yield proxy
