"""Equal random numbers of two guests from one image: `make bench-identity` or `python -m benchmarks.identity`.

A guest with Debian's kernel reads /dev/urandom every 20 ms. It is saved once it has been up for a minute, because a
kernel reseeds more often soon after its boot. Two guests are restored from the image, and their numbers are compared.
The guests have vmgenid devices with different GUIDs, vmgenid devices with the same GUID, or no vmgenid device. They run
on TCG. `--quick` saves the guest early, and limits the comparison to a few seconds. docs/identity.md discusses the
results.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pageferry
from benchmarks.harness import machine
from benchmarks.harness.bench import Bench, Results, Setting
from benchmarks.harness.tables import Column, Run, table
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest import identity
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial

KERNEL = machine.ROOT / ".cache" / "debian" / "vmlinuz"
"""Kernel with a driver for vmgenid."""
DEVICE = ("-device", "vmgenid,guid=auto")
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "vmgenid, different GUIDs": (DEVICE, {}),
    "vmgenid, same GUID": (DEVICE, {"guid": "image"}),
    "no vmgenid": ((), {}),
}
"""Options of QEMU, and options of the restore, by case."""
WARM, COMPARED = 3000, 90.0
"""Number of lines before the checkpoint, and maximum duration of the comparison in seconds."""
QUICK_WARM, QUICK_COMPARED = 20, 5.0
COLUMNS: tuple[Column, ...] = (
    ("equal for s", "equal-s", 2, 1),
    ("equal numbers", "equal", 0, 1),
    ("compared numbers", "compared", 0, 1),
)


def measure(setting: Setting) -> list[Run]:
    """Measure each case."""
    warm, compared = (QUICK_WARM, QUICK_COMPARED) if setting.quick else (WARM, COMPARED)
    parts = identity.parts(machine.QEMU, KERNEL, setting.folder)
    runs = []
    for _ in range(setting.repetitions):
        for name, (options, restoring) in CASES.items():
            comparison = Comparison(parts, setting.folder, options)
            runs.append({"guests": name} | asyncio.run(comparison.run(warm, compared, restoring)))
    return runs


class Comparison:
    """Two guests that are restored from one image. `options`: options of QEMU."""

    def __init__(self, parts: GuestParts, folder: Path, options: Sequence[str]) -> None:
        self._parts = parts
        self._folder = folder
        self._options = options

    async def run(self, warm: int, compared: float, restoring: dict[str, Any]) -> Run:
        """Save the guest after `warm` lines, restore it twice, and compare for up to `compared` seconds."""
        image = self._folder / "identity.img"
        image.unlink(missing_ok=True)
        source = self._serial("source")
        guest = await QemuWorkload.start("source", self._command(source))
        await identity.wait_for(source, warm, timeout=600)
        await pageferry.checkpoint_async(guest, image)
        await guest.discard()
        lines = [self._serial(name) for name in ("first", "second")]
        guests = [
            (await restore_guest(serial.path.name, image, self._command(serial), **restoring))[0] for serial in lines
        ]
        try:
            return await _compared(lines, compared)
        finally:
            for one in guests:
                await one.discard()

    def _serial(self, name: str) -> Serial:
        serial = Serial(self._folder / name)
        serial.path.unlink(missing_ok=True)
        return serial

    def _command(self, serial: Serial) -> list[str]:
        return self._parts.command(serial, *self._options, memory="192M", checker="ferry.pause=20")


async def _compared(lines: Sequence[Serial], limit: float) -> Run:
    """Compare the numbers of two guests until they differ, for up to `limit` seconds of the guests' time."""
    while True:
        await asyncio.sleep(0.5)
        pairs = list(zip(*map(identity.reports, lines), strict=False))
        equal = next((count for count, (one, two) in enumerate(pairs) if one.random != two.random), len(pairs))
        seconds = (pairs[max(equal - 1, 0)][0].up - pairs[0][0].up) / 1e3 if pairs else 0.0
        if equal < len(pairs) or seconds > limit:
            return {"equal": equal, "equal-s": seconds, "compared": len(pairs)}


def render(results: Results) -> list[str]:
    """Return a heading and a table."""
    return ["### Random numbers of two guests from one image", table(results["random"], ("guests",), COLUMNS)]


BENCH = Bench(name="identity", questions={"random": measure}, judge=lambda _: [], tables=render)

if __name__ == "__main__":
    machine.require("bench-identity", str(KERNEL))
    sys.exit(BENCH.main())
