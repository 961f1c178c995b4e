"""Tests of the synchronous forms of public coroutine functions."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pageferry
from pageferry import large_pages, sharing
from pageferry.errors import UsageError
from pageferry.host.blocking import synchronous

PARTS = (pageferry, large_pages, sharing)
FORMS = [
    pytest.param(getattr(part, name.removesuffix("_async")), getattr(part, name), id=name)
    for part in PARTS
    for name in part.__all__
    if name.endswith("_async")
]


@pytest.mark.parametrize("part", PARTS)
def test_every_public_coroutine_function_has_a_synchronous_form(part: ModuleType) -> None:
    coroutines = {name for name in part.__all__ if inspect.iscoroutinefunction(getattr(part, name))}
    assert {name for name in part.__all__ if name.endswith("_async")} == coroutines
    assert {name.removesuffix("_async") for name in coroutines} <= set(part.__all__)


@pytest.mark.parametrize(("call", "coroutine"), FORMS)
def test_both_forms_have_the_same_parameters_and_text(call: Callable[..., Any], coroutine: Callable[..., Any]) -> None:
    assert call.__name__ == coroutine.__name__.removesuffix("_async")
    if call.__name__ != "restore":
        assert inspect.signature(call) == inspect.signature(coroutine)
        assert inspect.getdoc(call) == inspect.getdoc(coroutine)


def test_synchronous_form_is_refused_where_it_would_block_an_event_loop(tmp_path: Path) -> None:
    async def main() -> None:
        pageferry.checkpoint(pageferry.Arena(4096), tmp_path / "image")

    with pytest.raises(UsageError, match=r"await checkpoint_async\(\)"):
        asyncio.run(main())
    assert list(tmp_path.iterdir()) == []


def test_interrupt_cancels_the_operation_first() -> None:
    ended = []

    async def wait_async() -> None:
        try:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        synchronous(wait_async)()
    assert ended == [True]
