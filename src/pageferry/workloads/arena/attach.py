"""Attachment of arenas of other processes by their names."""

from __future__ import annotations

from pageferry import values
from pageferry.errors import UsageError
from pageferry.host.blocking import synchronous
from pageferry.host.registry import ArenaEntry, Registry
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.arena.control_socket.client import RemoteArena
from pageferry.workloads.handles import AttachedArena, attach_handle


async def attach_async(name: str) -> Arena | AttachedArena:
    """Attach the memory of an arena that another process of this host has registered under a name.

    Returns a writable buffer of the same memory; `pageferry.Arrays.over` returns its arrays. The owner saves and
    migrates the arena, and traces the writes of this process like those of any process that maps the arena: `on_pause`
    of the owner must stop them. All deferred contents are loaded first. In the owner, the result is the arena itself.

    Raises NoSuchWorkload, UsageError if the name belongs to a guest, WorkloadError if the arena cannot be attached, for
    example because it belongs to another user.

    Examples:
        >>> from threading import Lock
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB", "table", on_pause=Lock())
        >>> attached = pageferry.attach("table")  # usually in another process
        >>> memoryview(attached)[5000] = 7
        >>> memoryview(arena)[5000]
        7
        >>> arena.close()
    """
    entry = Registry().lookup(values.text("name", name))
    if not isinstance(entry, ArenaEntry):
        raise UsageError(f"cannot attach {name}: it is not an arena; use the name of an arena (`pageferry list`)")
    remote = await RemoteArena.connect(entry.control_socket)
    try:
        handle = await remote.attach()
    finally:
        remote.close()
    return attach_handle(handle)  # type: ignore[no-any-return]  # an arena, or an attached one


attach = synchronous(attach_async)
