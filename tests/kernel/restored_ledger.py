"""Program with a ledger restored from an image on demand, without prefetch: `restored_ledger IMAGE NAME`.

The program prints a `ready` event. The command `load` on standard input loads all memory, then prints the deferred
bytes. The last line, after SIGTERM or after a migration of the ledger, reports the result of the verification.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path

import pageferry
from pageferry.checkpoints.restore_arena import RestoredArena
from pageferry.demo.ledger import LedgerWorkload


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    ended, reasons = threading.Event(), ["stopped"]

    def end(reason: str) -> None:
        reasons.insert(0, reason)
        ended.set()

    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    arena = pageferry.restore(Path(sys.argv[1]), prefetch=False)
    workload = LedgerWorkload(arena, postcopy=True, on_moved=lambda: end("moved"))
    assert arena.received_state is not None
    arena.control.load_state(arena.received_state)
    deferred = arena.deferred  # counted before the ledger writes, which loads pages
    arena.control.resume()
    arena.register(sys.argv[2])
    workload.name = sys.argv[2]
    say(type="ready", deferred=deferred)
    threading.Thread(target=answer, args=(arena,), daemon=True).start()
    ended.wait()
    workload.stop()
    report = workload.verify()
    say(type="ledger", reason=reasons[0], intact=report.intact, writes=report.writes, deferred=arena.deferred)


def answer(arena: RestoredArena) -> None:
    for line in sys.stdin:
        assert line == "load\n"
        arena.load()
        say(deferred=arena.deferred, finished=arena.pager.finished)


if __name__ == "__main__":
    main()
