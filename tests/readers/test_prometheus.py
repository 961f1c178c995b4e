"""Test of metrics with a Prometheus server, which scrapes a running command."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FETCHED = Path(__file__).parent.parent.parent / ".cache" / "prometheus" / "usr" / "bin" / "prometheus"
DEADLINE = 60.0


def find() -> str | None:
    return str(FETCHED) if FETCHED.exists() else shutil.which("prometheus")


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def asked(base: str, query: str) -> list[dict[str, Any]]:
    """Return the result of a query to Prometheus at `base`; an empty list while Prometheus is starting."""
    try:
        with urllib.request.urlopen(f"{base}/api/v1/query?query={urllib.parse.quote(query)}", timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found
    except OSError:
        return []


def test_prometheus_scrapes_a_receiver(tmp_path: Path) -> None:
    program = find()
    if program is None:
        pytest.skip("no prometheus: `make system` fetches one on Debian")
    environment = {**os.environ, "PAGEFERRY_RUN_DIR": str(tmp_path / "run")}
    receive = [sys.executable, "-m", "pageferry", "receive", "web", "--workload", "demo", "--metrics", "127.0.0.1:0"]
    with running(receive, env=environment, stderr=subprocess.PIPE) as receiver:
        assert receiver.stderr is not None
        said = receiver.stderr.readline().decode()
        found = re.search(r"metrics at http://(127.0.0.1:\d+)/metrics", said)
        assert found, said
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "scrape_configs:\n"
            "  - job_name: pageferry\n"
            "    scrape_interval: 200ms\n"
            "    scrape_timeout: 200ms\n"
            f"    static_configs: [{{targets: ['{found[1]}']}}]\n"
        )
        port = free_port()
        server = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        with running([*server, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL):
            base, deadline = f"http://127.0.0.1:{port}", time.monotonic() + DEADLINE
            query = 'pageferry_events_total{type="listening"}'
            while not (series := asked(base, query)) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert [one["value"][1] for one in series] == ["1"]
            (info,) = asked(base, "pageferry_command_info")
            assert (info["metric"]["verb"], info["metric"]["subject"]) == ("receive", "web")
            assert [one["value"][1] for one in asked(base, "up")] == ["1"]
