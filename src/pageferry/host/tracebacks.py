"""Release of memory that errors keep: a traceback refers to the local variables of all its frames."""

from __future__ import annotations

import traceback


def release(error: BaseException) -> None:
    """Clear the local variables of all frames that have ended on the way of an error, and of those it came from.

    An operation holds mappings and userfaultfds of a workload. The caller may keep its error for as long as it likes
    (`OutcomeUnknown` is needed to recover), and the next operation must find the workload free.
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
