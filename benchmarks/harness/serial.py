"""Serial lines of guests, with the time of each tick."""

from __future__ import annotations

import bisect
import itertools
import re
import selectors
import socket
import threading
import time
from pathlib import Path

_TICK = re.compile(rb"FERRY tick \d+ writes=(\d+) .*errors=(\d+)")


class SerialLines:
    """Serial line of one guest. Each QEMU that runs the guest connects to the same socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ready = threading.Event()
        self.ticks: list[tuple[float, int]] = []
        """Ticks: time in seconds on the monotonic clock, and number of pages written until then."""
        self.errors = 0
        self.words: list[str] = []
        """All lines that are not ticks."""
        self._selector = selectors.DefaultSelector()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()
        self._selector.register(listener, selectors.EVENT_READ)
        self._rest: dict[socket.socket, bytes] = {}
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()

    def longest_silence(self, start: float, end: float) -> float:
        """Return the longest interval between two ticks that overlaps the period from `start` to `end`, seconds."""
        times = [at for at, _ in list(self.ticks)]
        gaps = [(late - early) for early, late in itertools.pairwise(times) if late > start and early < end]
        return max(gaps, default=0.0)

    def speaks(self, start: float, end: float, timeout: float = 0.0) -> bool:
        """Return whether a tick was received between `start` and `end`. Wait up to `timeout` seconds for one."""
        until = time.monotonic() + timeout
        while not (spoken := any(start < at < end for at, _ in list(self.ticks))) and time.monotonic() < until:
            time.sleep(0.01)
            end = max(end, time.monotonic())
        return spoken

    def time_to_writes(self, start: float, count: int) -> float | None:
        """Return the seconds from `start` until `count` more pages had been written; None if fewer were written."""
        ticks = list(self.ticks)
        before = max((writes for at, writes in ticks if at <= start), default=0)
        return next((at - start for at, writes in ticks if at > start and writes >= before + count), None)

    def rate(self, start: float, end: float) -> float:
        """Return the number of pages written per second between two times."""
        return (self._written(end) - self._written(start)) / (end - start)

    def _written(self, at: float) -> float:
        """Return the number of pages written until a time, interpolated linearly between ticks."""
        ticks = list(self.ticks)
        late = bisect.bisect_left(ticks, (at, 0))
        if not 0 < late < len(ticks):
            return float(ticks[min(late, len(ticks) - 1)][1])
        (before, first), (after, last) = ticks[late - 1], ticks[late]
        return first + (last - first) * (at - before) / (after - before)

    def _listen(self, listener: socket.socket) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    self._rest[connection] = b""
                    self._selector.register(connection, selectors.EVENT_READ)
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._read(key.fileobj)

    def _read(self, connection: socket.socket) -> None:
        now = time.monotonic()
        try:
            data = connection.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(connection)
            connection.close()
            return
        *lines, self._rest[connection] = (self._rest[connection] + data).split(b"\n")
        for line in lines:
            if found := _TICK.search(line):
                self.ticks.append((now, int(found[1])))
                self.errors = int(found[2])
                continue
            self.words.append(line.decode(errors="replace").strip())
            if b"FERRY ready" in line:
                self.ready.set()
