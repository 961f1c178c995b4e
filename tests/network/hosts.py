"""Network namespaces as hosts, for tests; see `carrier`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.kernel.moving import Host
from tests.kernel.programs import Program
from tests.network import carrier

GIGABIT = 125e6
"""Bytes per second of a 1 Gbit/s link."""
TUN = Path("/dev/net/tun")


class Network:
    """Hosts and the links between them; a context manager.

    `folder`: parent of the run directories of the hosts; `segments`: see `carrier.Setup`, False for tests of packet
    loss.
    """

    def __init__(self, folder: Path, hosts: int = 2, *, segments: bool = True, seed: int = 0) -> None:
        setup = {"hosts": hosts, "segments": segments, "seed": seed}
        self._carrier = Program(carrier.__file__, json.dumps(setup))
        self.hosts = [
            Host(("nsenter", f"--net={made['namespace']}", "--"), folder / str(number), made["address"])
            for number, made in enumerate(self._carrier.json()["hosts"])
        ]

    def order(self, **conditions: Any) -> None:
        """Change the conditions (see `carrier.Order`); they are in effect on return."""
        self._carrier.say(json.dumps(conditions))
        assert self._carrier.json() == {}

    def __enter__(self) -> Self:
        self._carrier.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._carrier.__exit__(kind, error, trace)


def missing() -> str | None:
    """Return the reason why network namespaces cannot be used; None if they can be used."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("nsenter") is None:
        return "no nsenter in PATH (package util-linux)"
    if not TUN.exists():
        return f"no {TUN}: the kernel has no TUN devices"
    return None


def require() -> None:
    """Skip the test, with the reason, if namespaces cannot be used."""
    if reason := missing():
        pytest.skip(reason)
