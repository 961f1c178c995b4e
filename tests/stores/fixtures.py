"""Fixtures of tests with a store: an S3 server of another project, and a proxy that injects faults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stores.fault_proxy import FaultProxy, fault_proxy
from tests.stores.s3_server import create_bucket, s3_server

URL = "s3://lazy/fleet"
"""Store of `proxy`."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Run an S3 server, and yield its URL."""
    pytest.importorskip("moto", reason="the S3 server of the package moto is not installed")
    with s3_server() as endpoint:
        yield endpoint


@contextmanager
def proxied(server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Run a proxy in front of the server, which the environment names as the endpoint of S3, and create a bucket."""
    with fault_proxy(server) as proxy:
        for name, value in (("ENDPOINT_URL", proxy.url), ("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        create_bucket(server, bucket)
        yield proxy


@pytest.fixture
def proxy(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Run a proxy in front of the server, with an empty cache. The bucket contains the images of earlier tests."""
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))
    with proxied(server, "lazy", monkeypatch) as proxy:
        yield proxy
