"""Program that saves an arena in mode `lazy`, which may fail, then in mode `stop`: `saving_user FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pageferry
from pageferry.errors import PageferryError


def main() -> None:
    """Print the error of the first checkpoint (null if it succeeds), and the status of the second checkpoint."""
    folder = Path(sys.argv[1])
    arena = pageferry.Arena(4 << 20)
    memoryview(arena)[:5] = b"ferry"
    error = None
    try:
        pageferry.checkpoint(arena, folder / "lazy")
    except PageferryError as refused:
        error = str(refused)
    result = pageferry.checkpoint(arena, folder / "stop", mode="stop")
    print(json.dumps({"error": error, "stop": result.status}))


if __name__ == "__main__":
    main()
