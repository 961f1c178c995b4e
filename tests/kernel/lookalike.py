"""Process whose pages have known contents, and the expected results of sharing them.

A number gives the contents of a page: 0 for zeros, a negative number for a repeated word, a positive number as the seed
of random bytes. `Lookalike` starts a process with private memory on huge pages; `python -m tests.kernel.lookalike
PAGES` is that process.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from pageferry._engine import LARGE_PAGE, SMALL_PAGE
from tests.kernel.programs import Program

SLOTS = LARGE_PAGE // SMALL_PAGE


def content(number: int) -> bytes:
    """Return the 4096 bytes of page contents that a number gives."""
    if number <= 0:
        return (-number).to_bytes(8, "little") * (SMALL_PAGE // 8)
    return random.Random(number).randbytes(SMALL_PAGE)


def unique(number: int) -> int:
    """Return a number that gives contents which no other page has. `number`: index of the page."""
    return 1_000_000 + number


def worth(workloads: Sequence[Sequence[int]]) -> tuple[dict[str, int], dict[str, int]]:
    """Return, by class, the number of pages, and the number of pages that sharing would free.

    `workloads`: numbers of the page contents of each workload.
    """
    pages, freed = Counter(dict.fromkeys(("zero", "pattern", "inside", "across"), 0)), Counter[str]()
    places: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for workload, numbers in enumerate(workloads):
        for number in numbers:
            places[number][workload] += 1
    for number, counts in places.items():
        total = sum(counts.values())
        inside, across = total - len(counts), len(counts) - 1
        if number == 0:
            pages["zero"] += total
            freed["zero"] += total
        elif total > 1 and number < 0:
            pages["pattern"] += total
            freed["pattern"] += inside + across
        elif total > 1:
            pages["inside"] += sum(count for count in counts.values() if count > 1)
            pages["across"] += sum(count for count in counts.values() if count == 1)
            freed["inside"] += inside
            freed["across"] += across
    return dict(pages), {name: freed[name] for name in pages}


class Lookalike(Program):
    """Process with `pages` pages of private memory at `address`."""

    def __init__(self, pages: int) -> None:
        super().__init__("-m", "tests.kernel.lookalike", str(pages))
        self.address: int = self.json()

    @property
    def pid(self) -> int:
        return self.process.pid

    def order(self, name: str, *arguments: Any) -> Any:
        """Execute a command in the process, and return its result."""
        self.say(json.dumps([name, *arguments]))
        return self.json()


class _Memory:
    def __init__(self, pages: int) -> None:
        length = pages * SMALL_PAGE
        self.map = mmap.mmap(-1, length + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map.madvise(mmap.MADV_HUGEPAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.start = -base % LARGE_PAGE
        self.address = base + self.start
        self.numbers: list[int] = []
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        self.writes = 0

    def fill(self, numbers: list[int]) -> None:
        """Fill each page with the contents that its number gives."""
        self.numbers = numbers
        for page, number in enumerate(numbers):
            self._put(page, number)

    def check(self) -> list[int]:
        """Return the pages whose contents differ from those written last."""
        return [page for page, number in enumerate(self.numbers) if self._at(page) != content(number)]

    def hammer(self, numbers: list[int], seed: int) -> None:
        """Start a thread that writes contents given by `numbers` to random pages, until `rest` is called."""
        choice = random.Random(seed)

        def work() -> None:
            while not self.stop.is_set():
                page, number = choice.randrange(len(self.numbers)), choice.choice(numbers)
                self._put(page, number)
                self.numbers[page] = number
                self.writes += 1

        self.stop.clear()
        self.thread = threading.Thread(target=work)
        self.thread.start()

    def rest(self) -> int:
        """Stop the thread, and return the number of writes."""
        assert self.thread is not None
        self.stop.set()
        self.thread.join()
        return self.writes

    def _put(self, page: int, number: int) -> None:
        at = self.start + page * SMALL_PAGE
        self.map[at : at + SMALL_PAGE] = content(number)

    def _at(self, page: int) -> bytes:
        at = self.start + page * SMALL_PAGE
        return self.map[at : at + SMALL_PAGE]


def main() -> None:
    """Execute the commands read from standard input."""
    memory = _Memory(int(sys.argv[1]))
    orders: dict[str, Callable[..., Any]] = {
        name: getattr(memory, name) for name in ("fill", "check", "hammer", "rest")
    }
    os.write(1, f"{memory.address}\n".encode())
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        os.write(1, json.dumps(orders[name](*arguments)).encode() + b"\n")


if __name__ == "__main__":
    main()
