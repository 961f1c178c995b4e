"""Program that tries what its privileges allow, and prints the names of the methods that were chosen, as JSON.

Arguments: an image of an arena, and a directory for new images.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from queue import Queue
from threading import Thread

import pageferry
from pageferry.checkpoints.events import EagerEvent
from pageferry.errors import PageferryError


def filled() -> pageferry.Arena:
    """Return an arena with contents."""
    arena = pageferry.Arena(4 << 20)
    memoryview(arena)[:5] = b"ferry"
    return arena


def restore(image: Path) -> str:
    """Restore an image."""
    events: list[object] = []
    arena = pageferry.restore(image, prefetch=False, listener=events.append)
    eager = any(isinstance(event, EagerEvent) for event in events)
    assert eager == (arena.deferred == 0)
    return "loaded first" if eager else "on demand"


def restore_shared(image: Path) -> str:
    """Restore an image with shared memory."""
    arena = pageferry.restore(image, memory="shared")
    return "on demand" if arena.eager_reason is None else "loaded first"


def checkpoint(folder: Path) -> str:
    """Save an arena, in mode `lazy` if possible."""
    arena = filled()
    try:
        pageferry.checkpoint(arena, folder / "lazy")
    except PageferryError as refused:
        if 'mode="stop"' not in str(refused):
            raise
        pageferry.checkpoint(arena, folder / "stop", mode="stop")
        return "`stop`"
    return "`lazy`"


def checkpoint_of_shared_file(folder: Path) -> str:
    """Save an arena whose descriptor other processes may have."""
    arena = filled()
    arena.fileno()
    try:
        pageferry.checkpoint(arena, folder / "handed-out", mode="stop")
    except PageferryError:
        return "refused"
    return "traced"


def migrate() -> str:
    """Migrate an arena within this process."""
    addresses: Queue[str] = Queue()
    received: Queue[pageferry.Arena] = Queue()

    def receive() -> None:
        with contextlib.suppress(PageferryError):  # the source reports the error
            received.put(pageferry.receive("127.0.0.1:0", listening=addresses.put))

    Thread(target=receive, daemon=True).start()
    try:
        pageferry.migrate(filled(), addresses.get(timeout=30))
    except PageferryError:
        return "refused"
    assert bytes(memoryview(received.get(timeout=30))[:5]) == b"ferry"
    return "yes"


def main() -> None:
    """Print the methods by the headings of the table in the guide."""
    image, folder = Path(sys.argv[1]), Path(sys.argv[2])
    print(
        json.dumps(
            {
                "huge pages": f"`{filled().large_pages_by}`",
                "migration": migrate(),
                "checkpoint": checkpoint(folder),
                "restore": restore(image),
                'memory="shared"': restore_shared(image),
                "after `fileno()`": checkpoint_of_shared_file(folder),
            }
        )
    )


if __name__ == "__main__":
    main()
