"""Program with a movable actor: `python movable_program.py ADDRESS COUNT TLS HOST...`.

It calls the actor at least COUNT times from several threads while the actor moves to the hosts, and prints what it has
found. With COUNT 0, it prints the address of the node of the actor for each line of input.
"""

from __future__ import annotations

import json
import pickle
import sys
import threading
import time
from typing import Any

import pageferry
from pageferry.errors import ActorLost
from pageferry.fleet import Movable, MovableHandle, start_movable
from pageferry.fleet.cluster import node_address

CALLERS = 4


class Log(Movable):
    """Actor that counts its calls, and the calls of each caller."""

    def open(self, arrays: pageferry.Arrays) -> None:
        self.counts = arrays["counts"] if "counts" in arrays else arrays.zeros("counts", CALLERS, "i8")
        self.data = arrays["data"] if "data" in arrays else arrays.zeros("data", 4 << 20, "i8")

    def add(self, caller: int) -> int:
        """Count a call, and write to the memory. Return the number of calls of this caller."""
        self.counts[caller] += 1
        self.data[int(self.counts.sum()) * 4097 % len(self.data)] += 1
        return int(self.counts[caller])

    def total(self) -> tuple[int, int]:
        """Return the number of calls, counted twice."""
        return int(self.counts.sum()), int(self.data.sum())

    def where(self) -> str:
        """Return the address of the node."""
        return node_address()

    def fail(self) -> None:
        """Raise an error."""
        raise KeyError("wanted")


def calling(handle: MovableHandle[Log], caller: int, least: int, moved: threading.Event, found: list[Any]) -> None:
    """Call the actor at least `least` times and until it has moved. Record each result that is not the expected one."""
    number, wrong = 0, []
    while number < least or not moved.is_set():
        number += 1
        if (result := handle.call("add", caller)) != number:
            wrong.append((caller, number, result))
    found.append((number, wrong))


def main() -> None:
    """Run the program."""
    address, count, tls, *hosts = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    handle = start_movable(Log, "log", "64MiB", host=hosts[0], address=address, tls=tls)
    if count == 0:
        while True:
            print(json.dumps(handle.call("where")), flush=True)
            sys.stdin.readline()
    ended: list[Any] = []
    moved = threading.Event()
    copies = [pickle.loads(pickle.dumps(handle)) for _ in range(CALLERS)]
    callers = [
        threading.Thread(target=calling, args=(copy, number, count // CALLERS, moved, ended))
        for number, copy in enumerate(copies)
    ]
    for caller in callers:
        caller.start()
    downtimes = [handle.move(host).downtime for host in hosts[1:]]
    moved.set()
    for caller in callers:
        caller.join()
    calls, wrong = sum(number for number, _ in ended), [one for _, each in ended for one in each]
    try:
        handle.call("fail")
        error = ""
    except KeyError as raised:
        error = str(raised)
    found = {"wrong": wrong, "calls": calls, "total": handle.call("total"), "downtimes": downtimes, "error": error}
    handle.stop()
    stopped: MovableHandle[Log] = MovableHandle("log", 5.0)
    end = time.monotonic() + 60
    while "lost" not in found and time.monotonic() < end:  # the process may serve a call until it exits
        try:
            stopped.call("total")
        except ActorLost as lost:
            found["lost"] = str(lost)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
