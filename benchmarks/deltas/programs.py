"""Programs with typical write patterns: `python -m benchmarks.deltas.programs NAME`.

Each program prints `ready`, and then writes until it is killed:

- `database`: SQLite in memory, with random updates of rows of 200 bytes
- `dictionary`: a dict of Python objects, some of which are replaced
- `array`: random changes in a large array of numbers
- `text`: lines that are appended while the oldest ones are removed
"""

from __future__ import annotations

import array
import collections
import random
import sqlite3
import sys
import time
from collections.abc import Callable

ROWS = 100_000
PAUSE = 0.0005
"""Seconds between two batches of writes, so that a program does not run at full speed."""


def database(choice: random.Random) -> Callable[[], object]:
    """Create a table. Return a function that updates 20 of its rows."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER, note TEXT)")
    rows = ((number, 0, choice.randbytes(100).hex()) for number in range(ROWS))
    connection.executemany("INSERT INTO accounts VALUES (?, ?, ?)", rows)

    def step() -> None:
        for _ in range(20):
            chosen = choice.randrange(ROWS)
            connection.execute("UPDATE accounts SET balance = balance + 1 WHERE id = ?", (chosen,))

    return step


def dictionary(choice: random.Random) -> Callable[[], object]:
    """Create a dict of objects. Return a function that replaces 20 of them."""
    held = {number: (number, choice.random(), str(number) * 4) for number in range(ROWS * 2)}

    def step() -> None:
        for _ in range(20):
            key = choice.randrange(ROWS * 2)
            held[key] = (key, choice.random(), str(choice.randrange(1 << 30)) * 2)

    return step


def numbers(choice: random.Random) -> Callable[[], object]:
    """Create an array. Return a function that changes 20 of its numbers."""
    held = array.array("d", (choice.random() for _ in range(ROWS * 60)))

    def step() -> None:
        for _ in range(20):
            held[choice.randrange(len(held))] += 1.0

    return step


def text(choice: random.Random) -> Callable[[], object]:
    """Create lines of a log. Return a function that appends 20 lines and removes the 20 oldest."""
    held = collections.deque(
        (f"{number} GET /{choice.randbytes(40).hex()} 200\n" for number in range(ROWS * 2)), ROWS * 2
    )

    def step() -> None:
        for _ in range(20):
            held.append(f"{len(held)} GET /{choice.randbytes(40).hex()} 200\n")

    return step


PROGRAMS: dict[str, Callable[[random.Random], Callable[[], object]]] = {
    "database": database,
    "dictionary": dictionary,
    "array": numbers,
    "text": text,
}


def main() -> None:
    """Run the program named on the command line until it is killed."""
    step = PROGRAMS[sys.argv[1]](random.Random(1))
    print("ready", flush=True)
    while True:
        step()
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
