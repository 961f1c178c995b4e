"""Migration of a guest by a script that uses qemu.qmp: `script.py SOCKET URI PARAMETERS [CAPABILITY...]`.

PARAMETERS: JSON object, the arguments of `migrate-set-parameters`. The script exits when the migration has ended, with
code 1 if the migration has failed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

from qemu.qmp import QMPClient


async def migrate(path: str, uri: str, parameters: dict[str, Any], capabilities: Sequence[str]) -> str:
    """Migrate the guest behind a QMP socket to a URI. Return the status of the migration."""
    client = QMPClient("source")
    await client.connect(path)
    items = [{"capability": name, "state": True} for name in ("events", *capabilities)]
    await client.execute("migrate-set-capabilities", {"capabilities": items})
    await client.execute("migrate-set-parameters", parameters)
    status = ""
    with client.listener("MIGRATION") as listener:
        await client.execute("migrate", {"uri": uri})
        async for event in listener:
            data: Any = event["data"]
            status = data["status"]
            if status in ("completed", "failed", "cancelled"):
                break
    await client.disconnect()
    return status


if __name__ == "__main__":
    socket, uri, parameters, *capabilities = sys.argv[1:]
    sys.exit(asyncio.run(migrate(socket, uri, json.loads(parameters), capabilities)) != "completed")
