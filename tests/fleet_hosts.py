"""Parts of a fleet for unit tests: a cluster whose agents reply as a test states, and operations of a real host.

The cluster takes the place of Ray only: requests and replies are those of `pageferry.fleet.protocol`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from pageferry.fleet.agent import Agent
from pageferry.fleet.inventory import HostConfig
from pageferry.fleet.operations import FOLDER, Order, now
from pageferry.fleet.protocol import AnyRequest, Kind, Moved, OperationReport, decode
from pageferry.host import proc

Reply = Callable[[str, AnyRequest], Any]


class ScriptedCluster:
    """Cluster whose agents reply as `reply` states: with a result, or with an error that it raises."""

    def __init__(self, reply: Reply, hosts: tuple[str, ...] = ("a", "b")) -> None:
        self._reply = reply
        self._hosts = hosts
        self.sent: list[tuple[str, AnyRequest]] = []
        """Requests, each with its host."""

    async def call(self, host: str, request: AnyRequest, kind: type[Any], *, timeout: float = 1.0) -> Any:
        """Send a request to an agent."""
        self.sent.append((host, request))
        found = self._reply(host, request)
        assert isinstance(found, kind)
        return found

    async def report(self, host: str) -> Any:
        """Return the state of a host."""
        from pageferry.fleet.protocol import Describe, HostReport

        return await self.call(host, Describe(), HostReport)

    async def names(self) -> list[str]:
        """Return the names of the hosts."""
        return list(self._hosts)

    async def draining(self) -> set[str]:
        """Return the hosts that are drained."""
        return set()

    def to(self, host: str, kind: type[Any]) -> list[Any]:
        """Return the requests of a class that were sent to a host."""
        return [request for name, request in self.sent if name == host and isinstance(request, kind)]


def report(identifier: str, kind: Kind, state: str = "running", **fields: Any) -> OperationReport:
    """Return the report of an operation of the workload `web`."""
    return OperationReport(id=identifier, kind=kind, workload="web", state=state, **fields)  # type: ignore[arg-type]


MOVED = Moved(name="web", kind="demo")


def agent(run: Path) -> Agent:
    """Return the agent of a host with the run directory `run`."""
    config = HostConfig(name="b", address="127.0.0.1", run_directory=str(run), insecure=True, memory=1 << 30)
    return Agent(msgspec.json.encode(config))


async def asked(host: Agent, request: AnyRequest, kind: type[Any]) -> Any:
    """Send a request to an agent, and return the reply."""
    return decode(await host.call(msgspec.json.encode(request)), kind, "b")


@contextmanager
def operation(
    run: Path, kind: Kind, *events: dict[str, Any], peer: str | None = "a"
) -> Iterator[subprocess.Popen[bytes]]:
    """Record a running operation `op` of the workload `web`, which has written `events`. Yield its process."""
    folder = run / FOLDER / "op"
    folder.mkdir(mode=0o700, parents=True)
    (run / FOLDER).chmod(0o700)
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            order = Order(id="op", kind=kind, workload="web", peer=peer, command=[], started=now())
            (folder / "order.json").write_bytes(msgspec.json.encode(order))
            record = {"pid": process.pid, "started": proc.start_time(process.pid), "boot": proc.boot_id()}
            for name in ("process.json", "running.json"):
                (folder / name).write_text(json.dumps(record))
            (folder / "stdout").write_text("".join(f"{json.dumps(event)}\n" for event in events))
            yield process
        finally:
            process.kill()
