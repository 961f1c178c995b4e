"""Requests before an arena is usable, counted at a proxy in front of an S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pageferry
from benchmarks.harness import machine
from benchmarks.harness.bench import Setting
from tests.stores.fault_proxy import fault_proxy
from tests.stores.s3_server import create_bucket, s3_server

PROGRAM = """
import sys, pageferry
arena = pageferry.restore(sys.argv[1], prefetch=False)
print("restored", flush=True)
sys.stdin.readline()
print(memoryview(arena)[0], flush=True)
"""


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Count the requests of a restore without prefetch, and those of the first access."""
    arena = pageferry.Arena(setting.folder.stat().st_blksize * 4096)
    memoryview(arena)[:] = os.urandom(len(memoryview(arena)))
    pageferry.checkpoint(arena, setting.folder / "counted", track=True)
    memoryview(arena)[:4096] = os.urandom(4096)
    pageferry.checkpoint(arena, setting.folder / "child", parent=setting.folder / "counted")
    runs = []
    with s3_server() as server, fault_proxy(server) as proxy:
        create_bucket(server, "counted")
        environment = os.environ | {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
        for name in ("counted", "child"):
            url = f"s3://counted/fleet/{name}"
            push = [sys.executable, "-m", "pageferry", "image", "push", str(setting.folder / name), url]
            subprocess.run(push, env=environment, check=True, capture_output=True)
            environment["PAGEFERRY_CACHE_DIR"] = str(setting.folder / f"cache-{name}")
            proxy.requests.clear()
            words = [sys.executable, "-c", PROGRAM, url]
            with subprocess.Popen(
                words, env=environment, cwd=machine.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as program:
                assert program.stdout is not None
                assert program.stdout.readline() == "restored\n"
                before = len(proxy.requests)
                out, _ = program.communicate("access\n", timeout=60)
                assert out
            runs.append({"image": name, "requests": before, "access-requests": len(proxy.requests) - before})
    return runs
