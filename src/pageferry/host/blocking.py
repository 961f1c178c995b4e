"""Blocking calls from coroutines, which go on behind nobody's back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def on_thread(call: Callable[[], T], cancel: Callable[[], object] | None = None) -> T:
    """The result of a call on a thread. When this is cancelled, `cancel` is called, and the thread waited for."""
    task = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if cancel is not None:
            cancel()
        with contextlib.suppress(Exception):
            await task
        raise
