"""Random migrations of a ledger and a guest between three hosts, with killed processes and failing links: `make soak`.

Each step migrates one of the two over a random link with random options. In most steps, a failure occurs at a fault
point or at a random time, and the operator's recovery follows (`journeys`). Afterwards exactly one host must run the
workload, with correct pages, and no other host may have remnants.

Environment: SOAK_MINUTES (30), SOAK_SEED (random), SOAK_FOLDER (.cache/soak). The seed determines the steps, but not
their timing.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pageferry.migration.options import Options
from tests.conftest import CACHE
from tests.guest.machines import GuestParts
from tests.kernel.programs import Program
from tests.network import hosts
from tests.network.hosts import GIGABIT, Network
from tests.network.journeys import DEEDS, POINTS, Journey, mend, nothing_left
from tests.network.travellers import GuestTraveller, LedgerTraveller, Traveller, guest_parts

HOSTS = 3
LINKS: dict[str, dict[str, float]] = {
    "short": {},
    "long": {"delay": 0.025, "rate": GIGABIT},
    "slow": {"delay": 0.005, "rate": GIGABIT / 4},
    "lossy": {"delay": 0.005, "rate": GIGABIT / 4, "loss": 0.005},
}
TROUBLES = [name for name in DEEDS if name != "source-workload"]
# The program sleeps briefly: on Linux 6.18, a low-priority task that never sleeps has been observed to starve kernel
# threads.
SPINNER = """
import os, time
os.nice(15)
while True:
    end = time.monotonic() + 0.01
    while time.monotonic() < end:
        pass
    time.sleep(0.0001)
"""
QUIET = 0.25
"""Fraction of the steps without a failure."""
MAX_WAIT = 3.0
"""Maximum seconds before a failure at a random time."""


@dataclass(frozen=True)
class Plan:
    """Parameters of one step."""

    step: int
    who: str
    hop: int
    """Distance to the target in the list of hosts."""
    link: str
    options: list[str]
    trouble: str
    """Name of the failure (see `journeys.DEEDS`); empty: none."""
    point: str
    """Fault point; empty: the failure occurs after `wait` seconds."""
    wait: float
    """Seconds until the failure."""


def plan(seed: int, step: int, names: list[str]) -> Plan:
    """Return the plan of a step, which depends only on the arguments."""
    dice = random.Random(f"{seed}/{step}")
    who = dice.choice(names)
    side = dice.choice(list(POINTS))
    quiet, at_a_point = dice.random() < QUIET, dice.random() < 0.5
    trouble = "" if quiet else dice.choice(TROUBLES)
    return Plan(
        step=step,
        who=who,
        hop=dice.randrange(1, HOSTS),
        link=dice.choice(list(LINKS)),
        options=_options(dice),
        trouble=trouble,
        point=f"{side}.{dice.choice(POINTS[side])}" if trouble and at_a_point else "",
        wait=round(dice.uniform(0, MAX_WAIT), 3),
    )


def _options(dice: random.Random) -> list[str]:
    """Return options: a random number of streams, and a random value of each option with a fixed set of values."""
    words = ["--streams", str(dice.choice((1, 1, 2, 4))), "--max-downtime", "5000"]
    for name, kind in get_type_hints(Options).items():
        if get_origin(kind) is Literal:
            words += [f"--{name.replace('_', '-')}", str(dice.choice(get_args(kind)))]
    return words


class Soak:
    """Hosts, travelling workloads and log of a soak."""

    def __init__(self, folder: Path, seed: int, parts: GuestParts | None) -> None:
        self.folder = folder
        self.seed = seed
        self.parts = parts
        self.results: collections.Counter[tuple[str, str]] = collections.Counter()
        """Number of steps by failure (empty: none) and result."""
        self.travellers: dict[str, Traveller] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Soak:
        with contextlib.ExitStack() as stack:
            self.network = stack.enter_context(Network(self.folder, HOSTS, seed=self.seed))
            stack.callback(self._end)
            self.log = stack.enter_context(open(self.folder / "steps.jsonl", "a", encoding="utf-8"))
            self.travellers["ledger"] = self._ledger()
            if self.parts is not None:
                self.travellers["guest"] = GuestTraveller(self.parts, self.folder, self.network.hosts[1])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, number: int) -> str:
        """Run one migration and return its result as text. Raises AssertionError if a check fails."""
        plan_ = plan(self.seed, number, list(self.travellers))
        self._tell(asdict(plan_))
        started = time.monotonic()
        result = self._travel(plan_)
        seconds = round(time.monotonic() - started, 1)
        self._tell({"step": number, "result": result, "seconds": seconds, "said": self.said()})
        self.results[plan_.trouble, result] += 1
        return f"{number}: {plan_.who} over a {plan_.link} link, {_what(plan_)}: {result}"

    def said(self) -> dict[str, str]:
        """Return the error output of the commands of the last step, by command."""
        return {path.stem: said for path in (self.folder / "agents").glob("*.stderr") if (said := path.read_text())}

    def finish(self) -> None:
        """Verify all memory of all workloads."""
        for traveller in self.travellers.values():
            traveller.verify()

    def _travel(self, plan_: Plan) -> str:
        traveller = self.travellers[plan_.who]
        everywhere = self.network.hosts
        target = everywhere[(everywhere.index(traveller.host) + plan_.hop) % HOSTS]
        self.network.order(**LINKS[plan_.link])
        fault = f"{plan_.point}=stop" if plan_.point else ""
        folder = self.folder / "agents"
        shutil.rmtree(folder, ignore_errors=True)
        with Journey(self.network, traveller, target, folder, *plan_.options, fault=fault) as journey:
            self._trouble(plan_, journey)
            owner = journey.settle()
        if owner == "none":
            # The only process that held the ledger was killed. A guest runs in a separate process.
            assert plan_.who == "ledger", f"the guest is lost, exit code {journey.code}"
            assert plan_.trouble == "destination-agent", f"the ledger is lost, exit code {journey.code}"
            traveller.end()
            self.travellers["ledger"] = self._ledger()
        elif plan_.who == "guest":
            traveller.verify()
        for host in everywhere:
            nothing_left(host, *(one.name for one in self.travellers.values() if one.host is host))
        return {"source": f"stays ({journey.code})", "destination": "moved", "none": "ended with its process"}[owner]

    def _trouble(self, plan_: Plan, journey: Journey) -> None:
        if plan_.point:
            journey.hold_or_end()
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                journey.migration.process.wait(plan_.wait)
        if plan_.trouble:
            DEEDS[plan_.trouble](journey)
        if plan_.point:
            journey.release()

    def _ledger(self) -> Traveller:
        # Not exact: an exact ledger reads all pages before it is resumed, which over a slow link takes longer than the
        # timeout.
        return LedgerTraveller(self.network.hosts[0], exact=False)

    def _end(self) -> None:
        mend(self.network)
        for traveller in self.travellers.values():
            traveller.end()

    def _tell(self, event: dict[str, Any]) -> None:
        self.log.write(json.dumps(event) + "\n")
        self.log.flush()


def _what(plan_: Plan) -> str:
    if not plan_.trouble:
        return "nothing fails"
    return f"{plan_.trouble} at {plan_.point}" if plan_.point else f"{plan_.trouble} after {plan_.wait:.1f} s"


@contextlib.contextmanager
def load() -> Iterator[None]:
    """Keep all CPUs busy with low-priority processes during the block."""
    with contextlib.ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            stack.enter_context(Program("-c", SPINNER))
        yield


def main() -> int:
    """Run random migrations for SOAK_MINUTES. Raises AssertionError if a check fails.

    Return 0 if each migration without a failure completed, 1 if not, 3 if the host lacks a requirement.
    """
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    seed = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(1 << 32))
    if reason := hosts.missing():
        print(f"cannot soak: {reason}", file=sys.stderr)
        return 3
    base = Path(os.environ.get("SOAK_FOLDER") or CACHE / "soak")
    base.mkdir(parents=True, exist_ok=True)
    # The name is short, because Unix socket paths are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix=f"{seed}-", dir=base))
    parts = guest_parts()
    print(f"seed {seed}, {minutes:g} minutes, log in {folder}" + ("" if parts else "; no guest: run `make system`"))
    end = time.monotonic() + minutes * 60
    with load(), Soak(folder, seed, parts) as soak:
        number = 0
        try:
            while time.monotonic() < end:
                number += 1
                print(soak.step(number), flush=True)
            soak.finish()
        except BaseException:
            print(f"step {number} failed: {plan(seed, number, list(soak.travellers))}", file=sys.stderr)
            for command, said in sorted(soak.said().items()):
                print(f"{command}: {said}", file=sys.stderr)
            print(f"SOAK_SEED={seed} repeats the steps; the logs are in {folder}", file=sys.stderr)
            raise
    print(f"{number} migrations, nothing lost (seed {seed})")
    for (trouble, result), count in sorted(soak.results.items()):
        print(f"{count:5} {trouble or 'nothing'} → {result}")
    return int(any(not trouble and result != "moved" for trouble, result in soak.results))


if __name__ == "__main__":
    sys.exit(main())
