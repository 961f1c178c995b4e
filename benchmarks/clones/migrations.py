"""Migration of a paused clone of 1 GiB to another run directory, with the image there and without it, over a link of
1 Gbit/s (`--bandwidth`)."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.clones.guests import WATCHED, image_of, start
from benchmarks.harness.bench import Setting
from benchmarks.migrate.pageferry_line import PAGEFERRY, expect, pageferry, reap

RATE = 8192
"""Load of the guest before it is paused: 8192 pages (32 MiB) written per second."""
LINK = "119M"
"""Rate of the link, bytes per second: 1 Gbit/s."""
METHODS = {"shared": ("--memory", "shared"), "all pages": ("--memory", "own")}


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Migrate a clone with each method, in turn."""
    image = setting.folder / "image"
    command, runs = image_of(setting, RATE, image), []
    for number in range(setting.repetitions):
        for method, options in METHODS.items():
            place = setting.folder / f"there-{number}-{method.split()[0]}"
            runs.append({"method": method} | _migrate(command, image, place, options))
    return runs


def _migrate(command: list[str], image: Path, place: Path, options: tuple[str, ...]) -> dict[str, Any]:
    clone = start(command, image, "shared", 1, "clone")
    name = clone["clones"][0]["name"]
    time.sleep(WATCHED)
    # The private memory of a paused clone is constant.
    subprocess.run([str(PAGEFERRY), "pause", name], check=True, capture_output=True)
    there = os.environ | {"PAGEFERRY_RUN_DIR": str(place)}
    words = ["receive", "moved", "--detach", "--output", "json", "--listen", "127.0.0.1:0"]
    base = ["--base", str(image)] if "own" not in options else []
    with subprocess.Popen(
        [str(PAGEFERRY), *words, *base, "--", *command], env=there, stdout=subprocess.PIPE
    ) as receiver:
        try:
            address = expect(receiver, "listening")["address"]
            process = pageferry("migrate", name, address, *options, "--bandwidth", LINK, "--output", "json")
            result = expect(process, "migration")
            reap(process)
            receiver.wait(60)
        finally:
            receiver.kill()
            subprocess.run([str(PAGEFERRY), "stop", "moved"], env=there, check=False, capture_output=True)
            subprocess.run([str(PAGEFERRY), "stop", name], check=False, capture_output=True)
    private = result["clone"]["private"]
    return {
        "private": private,
        "sent": result["transferred"],
        "sent-of-private": result["transferred"] / private,
        "running-ms": result["total-time"] - result["phases"].get("report", 0.0),
        "downtime-ms": result["downtime"],
    }
