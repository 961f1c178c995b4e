"""Program with an arena in which a thread increments a counter: `arena_owner NAME`.

Callbacks report each call on standard output. Commands on standard input:

- `read`: print the counter
- `fork`: start a child that also maps the arena, and print the child's pid
- `fail`: make the pause callback raise an error
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time

import numpy as np

from pageferry.workloads.arena.arena import Arena


def say(line: str) -> None:
    print(line, flush=True)


def idle() -> None:
    time.sleep(60)


class Counter:
    """Arena whose first word is incremented by a thread, except during a pause."""

    def __init__(self, name: str) -> None:
        self.may_run = threading.Event()
        self.parked = threading.Event()
        self.state = b"original"
        self.failing = False
        self.arena = Arena(
            4 << 20, name, state=self, on_pause=self.pause, on_resume=self.resume, on_moved=lambda: say("moved")
        )
        self.words = np.frombuffer(memoryview(self.arena), dtype=np.uint64)
        self.may_run.set()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            if not self.may_run.is_set():
                self.parked.set()
                self.may_run.wait()
            self.words[0] += 1
            time.sleep(0.0001)

    def pause(self) -> None:
        if self.failing:
            raise RuntimeError("will not")
        self.parked.clear()
        self.may_run.clear()
        self.parked.wait()
        say("paused")

    def resume(self) -> None:
        self.may_run.set()
        say("resumed")

    def save_state(self) -> bytes:
        return self.state

    def load_state(self, state: bytes) -> None:
        self.state = state


def main() -> None:
    counter = Counter(sys.argv[1])
    say("ready")
    children = []
    for line in sys.stdin:
        match line.strip():
            case "read":
                say(str(counter.words[0]))
            case "fail":
                counter.failing = True
                say("failing")
            case "fork":
                children.append(multiprocessing.get_context("fork").Process(target=idle, daemon=True))
                children[-1].start()
                say(str(children[-1].pid))


if __name__ == "__main__":
    main()
