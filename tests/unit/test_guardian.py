"""Tests of guardians with a monitor that behaves like QEMU's after a command whose client has disconnected."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from pageferry.host.guardian import Guardian, MonitorCommands


def test_guardian_ignores_the_reply_to_a_command_of_the_previous_client(tmp_path: Path) -> None:
    """The guardian waits for the reply to its last command before it disconnects: QEMU drops the unread commands of a
    client that has disconnected."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "monitor"))
        listener.listen()
        listener.settimeout(30)
        guardian = Guardian("a test")
        guardian.plan([MonitorCommands(str(tmp_path / "monitor"), [{"execute": "cont"}])])
        guardian.close()
        connection, _ = listener.accept()
    executed = []
    with connection, connection.makefile("rw") as client:
        connection.settimeout(30)
        said = [{"QMP": {}}, {"event": "STOP"}, {"return": {}, "id": "stop of the previous client"}]
        client.write("".join(json.dumps(message) + "\n" for message in said))
        client.flush()
        for line in client:
            command = json.loads(line)
            executed.append(command["execute"])
            reply = {"return": {"status": "completed"} if command["execute"] == "query-migrate" else {}}
            if not client_waits(connection):
                break
            client.write(json.dumps({**reply, "id": command["id"]}) + "\n")
            client.flush()
    assert guardian.finish(30)
    assert executed == ["qmp_capabilities", "query-migrate", "cont"]


def client_waits(connection: socket.socket) -> bool:
    """Return whether the client waits for a reply: it neither sends another command nor closes the connection."""
    connection.settimeout(0.5)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    else:
        return False
    finally:
        connection.settimeout(30)
