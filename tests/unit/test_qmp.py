"""Tests of QMP sessions with a monitor that is not QEMU."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.qmp import Monitor

GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""}, "capabilities": []}}
EVENT = {"event": "JOB_STATUS_CHANGE", "data": {}, "timestamp": {"seconds": 1, "microseconds": 0}}
STALE = {"error": {"class": "GenericError", "desc": "of the previous client"}, "id": "previous"}


async def opened(
    path: Path, before: list[dict[str, Any]], reply: dict[str, Any], *, first: tuple[dict[str, Any], ...] = ()
) -> None:
    """Open a session of a monitor that sends the messages `first` in front of its greeting, and the messages `before`
    in front of its first reply."""

    served = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for message in (*first, GREETING):
            writer.write(json.dumps(message).encode() + b"\n")
        if command := await reader.read(4096):  # commands do not end with a newline; empty: the client has given up
            for message in (*before, reply | {"id": json.loads(command)["id"]}):
                writer.write(json.dumps(message).encode() + b"\n")
            await reader.read()
        writer.close()
        await writer.wait_closed()
        served.set()

    async with await asyncio.start_unix_server(serve, path):
        try:
            await (await Monitor.open(str(path))).close()
        finally:
            await served.wait()


def test_session_ignores_events_and_replies_of_others_before_its_first_reply(tmp_path: Path) -> None:
    asyncio.run(opened(tmp_path / "qmp", [EVENT, STALE, {"return": {}, "id": "previous"}, EVENT], {"return": {}}))


def test_session_ignores_replies_of_others_before_the_greeting(tmp_path: Path) -> None:
    first = ({"return": {}, "id": "negotiation-1-1"}, STALE)
    asyncio.run(opened(tmp_path / "qmp", [], {"return": {}}, first=first))


def test_server_that_does_not_speak_qmp_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="created with QEMU's -qmp option"):
        asyncio.run(opened(tmp_path / "qmp", [], {"return": {}}, first=({"hello": 1},)))


@pytest.mark.parametrize("exits", ["before it accepts", "after its greeting"])
def test_listener_that_exits_while_a_session_opens_has_died(tmp_path: Path, exits: str) -> None:
    path = str(tmp_path / "qmp")

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            opening = asyncio.create_task(Monitor.open(path))
            await asyncio.sleep(0.05)
            if exits == "after its greeting":
                connection, _ = listener.accept()
                connection.send(json.dumps(GREETING).encode() + b"\n")
                await asyncio.sleep(0.05)
                connection.close()
        with pytest.raises(WorkloadDied, match="no QEMU listens"):
            await opening

    asyncio.run(run())


def test_refused_negotiation_is_an_error_with_the_reason(tmp_path: Path) -> None:
    error = {"class": "GenericError", "desc": "no such capability"}
    with pytest.raises(WorkloadError, match="no such capability"):
        asyncio.run(opened(tmp_path / "qmp", [EVENT], {"error": error}))
