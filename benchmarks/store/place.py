"""S3 server on one host, and a client on another, with a link of 20 ms and 1 Gbit/s between them.

The server is s3s-fs, a program of another project, which this module builds on first use with cargo.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import machine
from benchmarks.harness.bench import Setting
from benchmarks.peers import iperf
from tests.kernel.moving import Host
from tests.network.hosts import GIGABIT, Network

DELAY = 0.01
"""One-way delay, seconds."""
BUCKET = "images"
SERVER, VERSION = "s3s-fs", "0.13.0-alpha.3"
PORT = 52018
KEY = "benchmark"


@dataclass(frozen=True, slots=True)
class Place:
    """Client host, and the store that it reads over the link."""

    client: Host
    server: Host
    folder: Path
    """Directory of the bucket, the cache and copies of images."""
    environment: Mapping[str, str]

    @property
    def url(self) -> str:
        """URL of the store."""
        return f"s3://{BUCKET}/fleet"

    @property
    def cache(self) -> Path:
        """Directory of the cache of images."""
        return self.folder / "cache"

    def clear(self) -> None:
        """Remove the cached images."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def push(self, image: Path, name: str) -> None:
        """Upload an image on the host of the server, not over the link."""
        words = [sys.executable, "-m", "pageferry", "image", "push", str(image), f"{self.url}/{name}"]
        subprocess.run([*self.server.within, *words], env=dict(self.environment), check=True, capture_output=True)

    def upload(self, file: Path, key: str) -> None:
        """Upload a file as one object, on the host of the server."""
        words = [sys.executable, "-m", "benchmarks.store.transfer", "put", BUCKET, key, str(file)]
        subprocess.run([*self.server.within, *words], env=dict(self.environment), check=True, cwd=machine.ROOT)

    def download(self, key: str, target: Path) -> float:
        """Download an object over the link with several requests at a time. Return the duration, seconds."""
        words = [sys.executable, "-m", "benchmarks.store.transfer", "get", BUCKET, key, str(target)]
        begin = time.monotonic()
        subprocess.run([*self.client.within, *words], env=dict(self.environment), check=True, cwd=machine.ROOT)
        return time.monotonic() - begin

    def link_rate(self, seconds: int) -> float:
        """Return the rate that one iperf3 stream gets over the link, Mbit/s."""
        assert self.client.address is not None
        return iperf.one_stream(seconds, self.client.address, self.client.within, self.server.within)


@contextlib.contextmanager
def store(setting: Setting) -> Iterator[Place]:
    """Run the network and the server."""
    folder = setting.folder / "store"
    (folder / "buckets" / BUCKET).mkdir(parents=True)
    with Network(setting.folder / "hosts") as network:
        client, server = network.hosts
        environment = os.environ | {
            "AWS_ENDPOINT_URL": f"http://{server.address}:{PORT}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
            "AWS_REGION": "us-east-1",
            "PAGEFERRY_CACHE_DIR": str(folder / "cache"),
        }
        words = [_server(), "--host", str(server.address), "--port", str(PORT)]
        words += ["--access-key", KEY, "--secret-key", KEY, str(folder / "buckets")]
        with subprocess.Popen(
            [*server.within, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as running:
            try:
                _wait_for(server)
                network.order(delay=DELAY, rate=GIGABIT)
                yield Place(client, server, folder, environment)
            finally:
                running.kill()


def _wait_for(server: Host) -> None:
    """Wait until the server accepts connections."""
    probe = f"import socket; socket.create_connection(({server.address!r}, {PORT}), 1).close()"
    deadline = time.monotonic() + 30
    while subprocess.run([*server.within, sys.executable, "-c", probe], capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            raise RuntimeError("cannot measure: the S3 server does not accept connections")
        time.sleep(0.1)


def _server() -> str:
    """Return the path of the S3 server. Build it if it is missing."""
    if found := os.environ.get("S3S_FS") or shutil.which(SERVER):
        return found
    root = machine.ROOT / ".cache" / "s3s-fs"
    program = root / "bin" / SERVER
    if not program.exists():
        words = ["cargo", "install", SERVER, "--version", VERSION, "--features", "binary", "--locked"]
        subprocess.run([*words, "--root", str(root)], check=True, capture_output=True)
    return str(program)
