"""Release of memory that errors keep alive: a traceback refers to the local variables of all its frames."""

from __future__ import annotations

import traceback


def release(error: BaseException) -> None:
    """Clear the local variables of all completed frames in the tracebacks of an error and of its causes.

    An operation holds mappings and userfaultfds of a workload. The caller may keep the operation's error for any length
    of time (`OutcomeUnknown` is needed to recover). The next operation must be able to acquire the workload.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        waiting += [one.__cause__, one.__context__]
