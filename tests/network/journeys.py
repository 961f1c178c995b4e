"""One migration between two hosts during which a failure occurs, and the operator's recovery.

`Journey` runs a migration and stops it at a fault point. An entry of `DEEDS` causes the failure. `settle` takes the
recovery steps of docs/faults.md and returns the owner. Exactly one side must own the workload.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tests.kernel import moving
from tests.kernel.moving import Host
from tests.kernel.programs import Program, wait_until
from tests.network.hosts import Network
from tests.network.travellers import Traveller, inhabitants

Owner = Literal["source", "destination", "none"]

POINTS = {
    "source": "connected greeted set-up in-round between-rounds paused last-pages-sent state-sent ready recorded "
    "committed commit-sent answered".split(),
    "destination": "accepted in-round state-received loaded promised commit-received decided resumed".split(),
}
"""Fault points that each migration with rounds reaches (docs/protocol.md)."""
ROUNDS: dict[str, tuple[str, ...]] = {"source": ("between-rounds", "last-pages-sent"), "destination": ()}
"""Fault points of `POINTS` that a post-copy migration, which has no rounds, does not reach."""
LATE = {"source": ("missing-sent",), "destination": ("pager-begun",)}
"""Fault points that a post-copy migration reaches before Commit, instead of `ROUNDS`."""
TIMEOUT = "3"
"""Timeout of the migrations of these tests, seconds; longer than the scheduling delays of a busy machine."""
BLIP = 0.3
"""Duration of a short silence, seconds; shorter than each timeout."""
MAX_SECONDS = 120.0
"""Maximum duration of a migration, seconds."""
ASKING = 8
"""Maximum number of recovery requests. They fail while the process that can reply is starting or exiting."""


def points(mode: str) -> list[str]:
    """Return the fault points, as SIDE.POINT, that a migration in this mode reaches. A hybrid migration may reach
    fewer."""
    late = mode == "postcopy"
    return [
        f"{side}.{point}"
        for side, named in POINTS.items()
        for point in (*(one for one in named if not (late and one in ROUNDS[side])), *(LATE[side] if late else ()))
    ]


class Journey:
    """Migration of a workload from its host to another host.

    `fault`: POINT or POINT=ACTION; it is passed to the command that has the fault point.
    """

    def __init__(
        self, network: Network, traveller: Traveller, target: Host, folder: Path, *options: str, fault: str = ""
    ) -> None:
        self.network = network
        self.traveller = traveller
        self.origin, self.target = traveller.host, target
        self._log = folder
        self._late = "postcopy" in options or "hybrid" in options
        self._stack = contextlib.ExitStack()
        point, _, action = fault.partition("=")
        self._stopping = point if action == "stop" else ""
        at_source, at_destination = (fault if point.startswith(side) else None for side in ("source", "destination"))
        words = ("--timeout", TIMEOUT)
        self.peer = traveller.receiver(target, *words, fault=at_destination, stderr=self._file("receive"))
        try:
            self.address = moving.address_of(self.peer)
            self.migration = moving.migrating(
                traveller.name,
                self.address,
                *words,
                *options,
                host=self.origin,
                fault=at_source,
                stderr=self._file("migrate"),
            )
        except BaseException:
            self.peer.__exit__(None, None, None)
            self._stack.close()
            raise

    @property
    def held(self) -> Program:
        """Command that stops at the fault point."""
        return self.migration if self._stopping.startswith("source") else self.peer

    def hold(self) -> None:
        """Wait until the migration has stopped at its fault point."""
        moving.stopped(self.held)

    def hold_or_end(self) -> bool:
        """Wait until the migration has stopped at its fault point (True) or has ended without reaching it (False)."""

        def held() -> bool:
            process = self.held.process
            return process.poll() is None and moving.state(process.pid) == "T"

        wait_until(
            lambda: self.migration.process.poll() is not None or held(), f"the stop of {self._stopping}", MAX_SECONDS
        )
        return held()

    def release(self) -> None:
        """Continue the stopped command, if it is alive."""
        self.held.process.send_signal(signal.SIGCONT)

    def said(self, who: Literal["migrate", "receive", "recover"]) -> str:
        """Return the error output of a command."""
        path = self._log / f"{who}.stderr"
        return path.read_text() if path.exists() else ""

    # -- recovery by the operator

    def settle(self) -> Owner:
        """Wait for the end of the migration, restore the link, and recover. Return the owner.

        Check that the owner runs the workload.
        """
        code = self.code = self.migration.process.wait(MAX_SECONDS)
        mend(self.network)
        owner: Owner = "destination" if code == 0 else self._ask()
        if owner == "source":
            self._end_receiver()
            self.peer.__exit__(None, None, None)
            self.traveller.runs()
        elif self._arrives():
            self.traveller.arrived(self.target, self.peer)
            self.traveller.runs()
        else:
            owner = "none"
            self.peer.__exit__(None, None, None)
        return owner

    def _ask(self) -> Owner:
        """Recover until the outcome is known, through another receiver if the first has exited. Return the owner."""
        with contextlib.ExitStack() as answering:
            replaced = False
            for _ in range(ASKING):
                code, owner = self.recover()
                match code:
                    case 0:
                        return owner or "none"
                    case 2:  # no pending recovery: the workload never left the source
                        return "source"
                    case 11 | 13:  # no such workload: it was removed after the switch-over, or it has exited
                        return "destination"
                    case 26 | 28 if not replaced and self.peer.process.poll() is not None:
                        answering.enter_context(self._stand_in())
                        replaced = True
                    case _ if replaced and self._late and not self._arrives():
                        # The workload was killed at the destination before all pages were received. The operator takes
                        # the workload back.
                        assert self.recover("--take-back") == (0, "source")
                        return "source"
                    case _:
                        time.sleep(0.5)
        raise AssertionError(f"no reply, exit code {code}: {self.said('recover')}")

    def recover(self, how: str = "--recover") -> tuple[int, Owner | None]:
        """Run `pageferry migrate --recover` or `--take-back`. Return the exit code and the reported owner."""
        words = (how, "--timeout", TIMEOUT) if how == "--recover" else (how,)
        with moving.migrating(self.traveller.name, *words, host=self.origin, stderr=self._file("recover")) as recovery:
            assert recovery.process.stdout is not None
            out, _ = recovery.process.communicate(timeout=60)
        events = [json.loads(line) for line in out.splitlines()]
        return recovery.process.returncode, events[-1]["owner"] if events else None

    def _stand_in(self) -> Program:
        """Start another receiver on the destination's host, at the same address.

        If the workload exists there, the receiver resumes the post-copy migration of the workload.
        """
        resumed = self._late and self._arrives()
        what = (self.traveller.name, "--resume") if resumed else ("stand-in", "--workload", "demo")
        words = ("receive", *what, "--output", "json", "--insecure")
        program = self.target.program("-m", "pageferry", *words, "--listen", self.address)
        try:
            moving.address_of(program)
        except BaseException:
            program.__exit__(None, None, None)
            raise
        return program

    def _end_receiver(self) -> None:
        """Terminate a receiver that still waits for a source or for a recovery."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.peer.process.wait(3)
            return
        self.peer.process.terminate()
        assert self.peer.process.wait(30) in (143, -signal.SIGTERM), self.said("receive")

    def _arrives(self) -> bool:
        """Return whether the target has the workload. The workload outlives its receiver, but may have been killed."""
        return self.traveller.name in self.target.registry.entries()

    def _file(self, who: str) -> Any:
        self._log.mkdir(parents=True, exist_ok=True)
        return self._stack.enter_context(open(self._log / f"{who}.stderr", "wb"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.migration.__exit__(kind, error, trace)
        if error is not None:
            self.peer.__exit__(kind, error, trace)
        self._stack.close()


# -- failures


def _link(**conditions: Any) -> Callable[[Journey], None]:
    return lambda journey: journey.network.order(**conditions)


def _blip(journey: Journey) -> None:
    journey.network.order(silent=[0])
    journey.release()
    time.sleep(BLIP)
    journey.network.order(silent=[])


DEEDS: dict[str, Callable[[Journey], None]] = {
    "source-agent": lambda journey: journey.migration.kill(),
    "destination-agent": lambda journey: journey.peer.kill(),
    "source-workload": lambda journey: journey.traveller.kill(),
    "cut": _link(down=[0]),
    "silence": _link(silent=[0]),
    "blip": _blip,
    "delay": _link(delay=0.03),
    "damaged-pages": _link(corrupt="pages"),
    "damaged-words": _link(corrupt="control"),
    "damaged-answer": _link(corrupt="control", back=True),
}
"""Failures by name: killed processes and changed links."""


def mend(network: Network) -> None:
    """Restore the conditions of the link."""
    network.order(down=[], silent=[], delay=0.0, rate=0.0, loss=0.0, corrupt="")


def nothing_left(host: Host, *expected: str) -> None:
    """Wait until a host has only these workloads, and no other process or file.

    Check that the workloads have no write trace, no mount and no migration record.
    """
    registry = host.registry
    wait_until(
        lambda: set(registry.entries()) == set(expected), f"the end of all workloads but {expected} on {host.address}"
    )

    def strangers() -> dict[int, str]:
        known = {registry.lookup(name).pid for name in expected}
        return {pid: words for pid, words in inhabitants(host).items() if pid not in known}

    wait_until(lambda: not strangers(), f"the end of {strangers()} on {host.address}")
    if registry.path.exists():
        names = {path.name for path in registry.path.iterdir()} - {".lock", ".verdicts", ".ended", *expected}
        assert not names, names
    for name in expected:
        pid = registry.lookup(name).pid
        wait_until(lambda pid=pid: moving.traces(pid) == 0, f"the end of the traces of {name}")
        mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        assert not [mount for mount in mounts if str(registry.path) in mount]
        records = {path.name for path in (registry.path / name).iterdir()}
        assert "migration.json" not in records, records
