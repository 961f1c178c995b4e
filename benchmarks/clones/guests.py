"""Several guests of 1 GiB from one image, with shared memory and with separate memory, in turn."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.guests import guest, save
from benchmarks.harness import machine
from benchmarks.harness.bench import Setting
from benchmarks.migrate.pageferry_line import PAGEFERRY, PageferryLine, expect, pageferry, reap
from benchmarks.migrate.side_by_side import booted
from pageferry.host import smaps

RATE, HOT = 512, 5
"""Load of each guest: 512 pages (2 MiB) written per second, within 5 % of its memory."""
COUNTS = (1, 4, 16)
SETTLING = 1.0
"""Time for which the guest runs before it is saved, seconds."""
WATCHED = 5.0
"""Time for which the guests run before their memory is measured, seconds."""
METHODS = ("shared", "shared, filled base", "own")


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Save a guest, and start several guests from the image with each method."""
    image = setting.folder / "image"
    command = image_of(setting, RATE, image)
    runs = []
    for count, _ in itertools.product([2] if setting.quick else COUNTS, range(setting.repetitions)):
        for method in METHODS:
            image.with_name("image.ws").unlink(missing_ok=True)
            runs.append({"method": method, "guests": count} | _measure(command, image, method, count))
    return runs


def image_of(setting: Setting, rate: int, image: Path) -> list[str]:
    """Save a guest with the given load. Return the command line for guests that are restored from the image."""
    place, words = guest(setting, rate, HOT)
    line = PageferryLine("cloned", place, machine.QEMU, words)
    with booted([(line, [])]):
        assert line.current is not None
        line.current.monitor.execute("cont")
        time.sleep(SETTLING)
        save(line, image)
        line.end()
    return command_of(line, setting.folder)


def command_of(line: PageferryLine, folder: Path) -> list[str]:
    """Return the command line of the clones, with a serial line for each clone, and without the monitor of `line`."""
    words = line.command(0)
    serial, qmp = words.index("-serial"), words.index("-qmp")
    words[serial + 1] = f"file:{folder}/{{name}}.serial"
    return words[:qmp] + words[qmp + 2 :]


def _measure(command: Sequence[str], image: Path, method: str, count: int) -> dict[str, Any]:
    first = start(command, image, "shared", 1, "first") if "filled" in method else None
    try:
        if first is not None:
            _await_filled()
        result = start(command, image, method.split(",")[0], count, "clone")
        try:
            time.sleep(WATCHED)
            return _figures(result, count)
        finally:
            stop(result)
    finally:
        if first is not None:
            stop(first)


def start(command: Sequence[str], image: Path, memory: str, count: int, name: str) -> dict[str, Any]:
    """Start guests from an image. Return the result of the command."""
    words = ("--count", str(count), "--name", f"{name}-{{n}}", "--memory", memory, "--detach", "--output", "json")
    process = pageferry("clone", str(image), *words, "--", *command)
    result = expect(process, "clone")
    reap(process)
    return result


def _await_filled() -> None:
    """Wait until the base is complete."""
    while True:
        process = pageferry("list", "--bases", "--output", "json")
        base = expect(process, "base")
        reap(process)
        if not base["deferred"]:
            return
        time.sleep(0.2)


def _figures(result: dict[str, Any], count: int) -> dict[str, Any]:
    pss = [smaps.rollup(clone["pid"])["Pss"] for clone in result["clones"]]
    times = sorted(clone["time-to-running"] for clone in result["clones"])
    return {
        "all-running-ms": result["time-to-all-running"],
        "first-running-ms": times[0],
        "pss-per-guest": sum(pss) / count,
        "private-per-guest": sum(clone["private"] or 0 for clone in result["clones"]) / count,
    }


def stop(result: dict[str, Any]) -> None:
    """Stop the guests of a result."""
    for clone in result["clones"]:
        subprocess.run([str(PAGEFERRY), "stop", clone["name"]], check=False, capture_output=True)
