"""Test of an arena that QEMU maps as guest memory without the knowledge of the program that owns the arena."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

import pageferry
from pageferry.workloads.arena.arena import Arena
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial
from tests.kernel import moving
from tests.kernel.programs import wait_until

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("root")


def test_writes_of_a_virtual_machine_that_maps_an_arena_are_traced(payload_parts: GuestParts, tmp_path: Path) -> None:
    arena = Arena(64 * MIB, on_pause=lambda: pause(), on_resume=lambda: os.kill(machine.pid, signal.SIGCONT))
    file = f"/proc/{os.getpid()}/fd/{arena.descriptor}"
    backend = ["-object", f"memory-backend-file,id=ram,size=64M,share=on,mem-path={file}"]
    serial = Serial(tmp_path / "serial")
    command = payload_parts.command(serial, *backend, memory="64M", checker="ferry.mib=32 ferry.writes=8")
    at = command.index("-nodefaults")
    command[at:at] = ["-machine", "pc,memory-backend=ram"] if "-machine" not in command else []
    machine = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def pause() -> None:
        os.kill(machine.pid, signal.SIGSTOP)
        wait_until(lambda: moving.state(machine.pid) == "T", "the process to stop")

    traced: list[int] = []
    try:
        wait_until(lambda: len(arena.workload().regions[0].segments) > 1, "the mapping by QEMU")
        assert {segment.pid for segment in arena.workload().regions[0].segments} == {os.getpid(), machine.pid}
        asyncio.run(serial.ready())
        saving = pageferry.checkpoint_async(
            arena,
            tmp_path / "image",
            bandwidth=32 * MIB,
            listener=lambda event: traced.append(moving.traces(machine.pid)),
        )
        assert asyncio.run(saving).status == "completed"
        assert max(traced) > 0
        wait_until(lambda: moving.traces(machine.pid) == 0, "the removal of the traces")
        asyncio.run(serial.ticks(2))
    finally:
        machine.kill()
        machine.wait()
