"""Commands of users for QEMU's monitor, in HMP (human-readable) or QMP (JSON).

A session is opened for each command, and closed after it, so that other commands of pageferry can use the monitor
between two of them. The state of a session, such as descriptors passed by `getfd`, does not exist in the next session.

`cont` is refused for a guest that may belong to another host, as by `resume`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec

from pageferry import values
from pageferry.control.pausing import check_owner
from pageferry.control.session import guest_session
from pageferry.errors import UsageError, WorkloadDied
from pageferry.host.blocking import synchronous
from pageferry.host.qmp import Command, Monitor
from pageferry.host.registry import Folder
from pageferry.workloads.qemu import run_state

_HMP = "human-monitor-command"
_CONT = frozenset(("c", "cont"))
_QUIT = frozenset(("q", "quit"))


async def monitor_async(name: str, command: str) -> str:
    """Execute an HMP command of QEMU, such as `info status`, and return its output. QEMU reports errors of HMP commands
    in the output.

    Raises NoSuchWorkload, UnsupportedError for workloads that are not guests, WorkloadDied, and WorkloadError if
    another client has the monitor.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> print(pageferry.monitor("web", "info status").strip())
        VM status: running
        >>> pageferry.stop("web")
    """
    return str(await qmp_async(name, _HMP, {"command-line": values.text("command", command)}) or "")


monitor = synchronous(monitor_async)


async def qmp_async(name: str, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Execute a QMP command of QEMU, such as `query-status`, and return its result, decoded from JSON.

    Raises WorkloadError with QEMU's message if the command fails, and the same errors as `monitor_async`.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> pageferry.qmp("web", "query-status")["status"]
        'running'
        >>> pageferry.qmp("web", "qom-get", {"path": "/machine", "property": "type"})
        'pc-i440fx-...-machine'
        >>> pageferry.stop("web")
    """
    values.text("command", command)
    given = dict(values.instance("arguments", arguments, dict)) if arguments is not None else {}
    execute: Command = {"execute": command, **({"arguments": given} if given else {})}
    async with guest_session(name, "use the monitor of") as (folder, session):
        await _check(folder, session, execute)
        with contextlib.suppress(WorkloadDied) if _name(execute) in _QUIT else contextlib.nullcontext():
            return await session.run(execute)


qmp = synchronous(qmp_async)


def parse_qmp(line: str) -> tuple[str, dict[str, Any] | None]:
    """Return the command and the arguments in a line: the name of a command, or a JSON object with `execute`. Raises
    UsageError."""
    if not line.startswith("{"):
        return line, None
    try:
        decoded = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.MsgspecError as wrong:
        raise UsageError(f"invalid QMP command: {wrong}") from wrong
    command, arguments = decoded.pop("execute", None), decoded.pop("arguments", None)
    decoded.pop("id", None)
    if not isinstance(command, str) or not isinstance(arguments, dict | None) or decoded:
        raise UsageError('invalid QMP command: expected {"execute": NAME, "arguments": {...}}')
    return command, arguments


async def _check(folder: Folder, session: Monitor, command: Command) -> None:
    """Raise WorkloadError if a command would resume a guest that may belong to another host."""
    if _name(command) in _CONT and not await run_state.runs(session):
        check_owner(folder)


def _name(command: Command) -> str:
    """Return the name of a QMP command, or of the HMP command in it."""
    if command["execute"] != _HMP:
        return str(command["execute"])
    words = str(command.get("arguments", {}).get("command-line", "")).split()
    return words[0] if words else ""
