"""One migration between two hosts during which something fails, and what an operator does then.

`Journey.begin` gets a migration to a named point and holds it there; `strike` does what is to go wrong; `settle` is
what docs/faults.md tells the operator to do, and finds out whose the workload is: exactly one's.
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

Owner = Literal["source", "destination", "nobody"]

POINTS = {
    "source": "connected greeted set-up in-round between-rounds paused last-pages-sent state-sent ready recorded "
    "committed commit-sent answered".split(),
    "destination": "accepted in-round state-received loaded promised commit-received decided resumed".split(),
}
"""That every migration with rounds comes to (docs/protocol.md)."""
ROUNDS: dict[str, tuple[str, ...]] = {"source": ("between-rounds", "last-pages-sent"), "destination": ()}
LATE = {"source": ("missing-sent",), "destination": ("pager-begun",)}
"""What a post-copy comes to before Commit, instead of rounds."""
TIMEOUT = "3"
"""Seconds of silence for which these migrations wait; more than a busy machine makes anybody silent."""
BLIP = 0.3
"""Seconds of silence that end before anybody's timeout does."""
LONGEST = 120.0
"""Seconds that a migration may take."""
ASKING = 8
"""Times that the peer is asked: the process that has the answer may be about to come or go."""


def points(mode: str) -> list[str]:
    """The points, as SIDE.POINT, that a migration of this mode comes to; a hybrid one may come to fewer."""
    late = mode == "postcopy"
    return [
        f"{side}.{point}"
        for side, named in POINTS.items()
        for point in (*(one for one in named if not (late and one in ROUNDS[side])), *(LATE[side] if late else ()))
    ]


class Journey:
    """From the traveller's host to another one. `fault`: POINT or POINT=ACTION, in whichever agent has that point."""

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
        """The agent that stops at the fault point."""
        return self.migration if self._stopping.startswith("source") else self.peer

    def hold(self) -> None:
        """Wait until the migration is at its point."""
        moving.stopped(self.held)

    def hold_or_end(self) -> bool:
        """Wait until the migration is at its point (True), or has ended without coming to it."""

        def held() -> bool:
            process = self.held.process
            return process.poll() is None and moving.state(process.pid) == "T"

        wait_until(
            lambda: self.migration.process.poll() is not None or held(), f"the stop of {self._stopping}", LONGEST
        )
        return held()

    def release(self) -> None:
        """Let the stopped agent go on, if it lives."""
        self.held.process.send_signal(signal.SIGCONT)

    def said(self, who: Literal["migrate", "receive", "recover"]) -> str:
        """What an agent has said to people."""
        path = self._log / f"{who}.stderr"
        return path.read_text() if path.exists() else ""

    # -- what an operator does

    def settle(self) -> Owner:
        """Wait for the end, mend the link, find out whose it is now, and have it be so everywhere."""
        code = self.code = self.migration.process.wait(LONGEST)
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
            owner = "nobody"
            self.peer.__exit__(None, None, None)
        return owner

    def _ask(self) -> Owner:
        """`--recover`, with somebody at the other end who can answer."""
        with contextlib.ExitStack() as answering:
            replaced = False
            for _ in range(ASKING):
                code, owner = self.recover()
                match code:
                    case 0:
                        return owner or "nobody"
                    case 2:  # in no doubt: it never left
                        return "source"
                    case 11 | 13:  # no such workload any more: it was taken away once it ran there, or has died
                        return "destination"
                    case 26 | 28 if not replaced and self.peer.process.poll() is not None:
                        answering.enter_context(self._stand_in())
                        replaced = True
                    case _ if replaced and self._late and not self._arrives():
                        # It ran there, and was killed before it had everything: for who decides that it goes on here.
                        assert self.recover("--take-back") == (0, "source")
                        return "source"
                    case _:
                        time.sleep(0.5)
        raise AssertionError(f"no answer, {code}: {self.said('recover')}")

    def recover(self, how: str = "--recover") -> tuple[int, Owner | None]:
        """`pageferry migrate --recover` or `--take-back`: its exit code, and the owner that it names."""
        words = (how, "--timeout", TIMEOUT)
        with moving.migrating(self.traveller.name, *words, host=self.origin, stderr=self._file("recover")) as recovery:
            assert recovery.process.stdout is not None
            out, _ = recovery.process.communicate(timeout=60)
        events = [json.loads(line) for line in out.splitlines()]
        return recovery.process.returncode, events[-1]["owner"] if events else None

    def _stand_in(self) -> Program:
        """Another receiver on the destination's host, at the same address; for what lives there, if it does."""
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
        """One that waits, for a source or for a question, has to be told that nobody will come."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.peer.process.wait(3)
            return
        self.peer.process.terminate()
        assert self.peer.process.wait(30) in (143, -signal.SIGTERM), self.said("receive")

    def _arrives(self) -> bool:
        """Whether it lives at the target; its agent may be gone, or it may have died since."""
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


# -- what can go wrong


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
    "delay": _link(delay=0.1),
    "damaged-pages": _link(corrupt="pages"),
    "damaged-words": _link(corrupt="control"),
    "damaged-answer": _link(corrupt="control", back=True),
}
"""Deaths, and what links do."""


def mend(network: Network) -> None:
    """The link is as before."""
    network.order(down=[], silent=[], delay=0.0, rate=0.0, loss=0.0, corrupt="")


def nothing_left(host: Host, *expected: str) -> None:
    """Wait until nothing is on that host but these workloads: no process, no file, no mount, no name."""
    registry = host.registry
    wait_until(lambda: set(registry.entries()) == set(expected), f"that {host.address} has {expected} only")

    def strangers() -> dict[int, str]:
        known = {registry.lookup(name).pid for name in expected}
        return {pid: words for pid, words in inhabitants(host).items() if pid not in known}

    wait_until(lambda: not strangers(), f"the end of {strangers()} on {host.address}")
    if registry.path.exists():
        names = {path.name for path in registry.path.iterdir()} - {".lock", ".verdicts", *expected}
        assert not names, names
    for name in expected:
        pid = registry.lookup(name).pid
        wait_until(lambda pid=pid: moving.traces(pid) == 0, f"the end of the traces of {name}")
        mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        assert not [mount for mount in mounts if str(registry.path) in mount]
        records = {path.name for path in (registry.path / name).iterdir()}
        assert "migration.json" not in records, records
