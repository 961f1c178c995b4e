"""Connection to a cluster of Ray without its token: `python -m pageferry.fleet.cluster_probe ADDRESS`.

It prints `accepted` or `refused`. It runs in a separate process, because Ray reads its settings once per process.
"""

from __future__ import annotations

import os
import sys

SECONDS = 10


def main() -> int:
    """Try to read from the cluster at the address in the arguments."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # not in the stubs of Ray
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=sys.argv[1]).internal_kv_get(b"probe", b"pageferry", timeout=SECONDS)
    except AuthenticationError:
        sys.stdout.write("refused\n")
        return 0
    sys.stdout.write("accepted\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
