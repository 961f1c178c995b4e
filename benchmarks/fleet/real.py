"""Real moves of a fleet: `python -m benchmarks.fleet.real [--clones 8] [--memory 512] [--rounds 3]`, as root.

Three hosts are network namespaces of this machine, with a run directory and a node of Ray each. The guests run the
payload, which verifies its memory, on TCG; it writes a few pages and sleeps, so that two cores are not the result.

- `evacuation`: clones of one image are moved away from their host, at 1 Gbit/s per host. Only private pages are sent if
  the other hosts have the image (`base present`), otherwise all pages (`base absent`). With `--rounds N`, the host with
  the most clones is evacuated N times.
- `one after another`: the same guests, each with separate memory, are migrated one after the other at 1 Gbit/s. The
  time is the sum of the durations of the migrations. It excludes the starts of the receivers, which the evacuation
  includes.

The result is printed as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import CACHE
from tests.guest import payload
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial
from tests.kernel import moving
from tests.kernel.programs import wait_until
from tests.network.fleet import Fleet

RATE = 125_000_000
"""Rate of a link, bytes per second."""
SPARE = 32
"""Memory of a guest that the payload does not write to, MiB."""


class Clones:
    """Clones of one image, which are moved by a fleet."""

    def __init__(self, fleet: Fleet, folder: Path, memory: int) -> None:
        qemu = CACHE / "qemu-10/bin/qemu-system-x86_64"
        parts = GuestParts(qemu, payload.build(CACHE / "guest/payload"))
        self.serials = folder / "serials"
        self.serials.mkdir()
        self.fleet = fleet
        checker = f"ferry.mib={memory - SPARE} ferry.writes=1"
        self.command = parts.command(Serial(self.serials / "{name}-{host}"), memory=f"{memory}M", checker=checker)

    def save(self) -> None:
        """Write the image of a guest that has filled its memory, and end the guest."""
        self.fleet.run("run", "guest", "--host", "a", "--", *self.command)
        asyncio.run(Serial(self.serials / "guest-a").ready())
        self.fleet.run("checkpoint", str(self.fleet.images), "guest")
        self._pageferry("a", "stop", "guest")

    def start(self, count: int) -> None:
        """Start the clones on as few hosts as possible."""
        self.fleet.run(
            "clone", "guest.img", "--count", str(count), "--pack", "--name", "clone-{n}", "--", *self.command
        )

    def evacuate(self) -> dict[str, Any]:
        """Evacuate the host that has most clones. Return what was measured."""
        host = Counter(self.fleet.where().values()).most_common(1)[0][0]
        found = self.fleet.run("evacuate", host)[-1]
        moves = found["moves"]
        return {
            "moves": len(moves),
            "done": sum(move["outcome"] == "done" for move in moves),
            "seconds": found["total-time"],
            "downtimes-ms": sorted(round(move["downtime"] * 1e3, 1) for move in moves),
            "bytes": sum(move["transferred"] for move in moves),
            "shares-base": sum(move["shares-base"] for move in moves),
        }

    def one_after_another(self, count: int) -> dict[str, Any]:
        """Migrate guests with separate memory one after the other. Return what was measured."""
        times, downtimes, sent = [], [], 0
        for number in range(1, count + 1):
            name = f"full-{number}"
            words = [word.replace("{host}", "a") for word in self.command]
            image = str(self.fleet.images / "guest.img")
            self._pageferry("a", "restore", name, image, "--eager", "--detach", "--", *words)
            wait_until(lambda name=name: self._deferred(name) == 0, f"the memory of {name}", 120)
            there, here = self.fleet.hosts["b"], self.fleet.hosts["a"]
            words = [word.replace("{host}", "b") for word in self.command]
            listen = ("--listen", f"{there.address}:0", "--tls", str(self.fleet.trust["b"]), "--detach")
            receiving = ("-m", "pageferry", "receive", name, *listen, "--output", "json", "--", *words)
            with there.program(*receiving) as receiver:
                address = moving.address_of(receiver)
                trust = ("--tls", str(self.fleet.trust["a"]), "--bandwidth", str(RATE), "--output", "json")
                with here.program("-m", "pageferry", "migrate", name, address, *trust) as migration:
                    found = moving.until(migration, "migration")
                    migration.wait()
                receiver.wait()
            times.append(found["total-time"] / 1e3)
            downtimes.append(round(found["downtime"], 1))
            sent += found["transferred"]
            asyncio.run(Serial(self.serials / f"{name}-b").passes(1))
            self._pageferry("b", "stop", name)
        return {"moves": count, "seconds": sum(times), "downtimes-ms": sorted(downtimes), "bytes": sent}

    def check(self) -> None:
        """Check that each clone runs, and that no guest has found an incorrect page."""
        for name, host in self.fleet.where().items():
            asyncio.run(Serial(self.serials / f"{name}-{host}").ticks(2))
        assert [path.name for path in self.serials.iterdir() if Serial(path).bad] == []

    def _deferred(self, name: str) -> int:
        with self.fleet.hosts["a"].program("-m", "pageferry", "list", "--output", "json") as listing:
            assert listing.process.stdout is not None
            found = [json.loads(line) for line in listing.process.stdout]
        return next(int(one["deferred"]) for one in found if one["name"] == name)

    def _pageferry(self, host: str, *words: str) -> None:
        with self.fleet.hosts[host].program("-m", "pageferry", *words) as program:
            assert program.process.wait(120) == 0, words


@contextmanager
def clones(memory: int, count: int, *, base: str) -> Iterator[Clones]:
    """Yield clones on one host of a fleet. `base`: whether the other hosts have the image, `present` or `absent`."""
    with tempfile.TemporaryDirectory() as folder, Fleet(Path(folder) / "fleet", link=str(RATE), memory="8G") as fleet:
        made = Clones(fleet, Path(folder), memory)
        made.save()
        if base == "absent":
            for name in ("b", "c"):
                fleet.leave(name)
            fleet.join("b", "c", images=folder)
        made.start(count)
        yield made


def main() -> int:
    """Run the measurements, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clones", type=int, default=8)
    parser.add_argument("--memory", type=int, default=512, help="memory of a guest, MiB")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, Any] = {"clones": args.clones, "memory-mib": args.memory}
    for base in ("present", "absent"):
        with clones(args.memory, args.clones, base=base) as made:
            found[f"evacuation, base {base}"] = [made.evacuate() for _ in range(args.rounds)]
            made.check()
            if base == "present":
                found["one after another"] = made.one_after_another(args.clones)
                made.check()
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
