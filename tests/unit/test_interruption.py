"""Tests of signals that a process receives during a verb."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from pageferry.cli.signals import Interruption


@pytest.mark.timeout(20)
def test_second_signal_discards_no_callback_of_the_event_loop() -> None:
    """An exception from the signal handler could abort a callback; a task would then wait forever for its result."""
    steps = []

    async def verb() -> int:
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def callback() -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            steps.append("callback")
            done.set_result(None)

        loop.call_soon(callback)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.shield(done)
            steps.append("cleanup")
        return 0

    with Interruption() as interruption, pytest.raises(KeyboardInterrupt):
        interruption.run(verb())
    assert interruption.received is signal.SIGTERM
    assert steps == ["callback", "cleanup"]


@pytest.mark.timeout(20)
def test_signal_that_another_thread_receives_ends_the_verb() -> None:
    """The event loop waits in the main thread, which the signal does not interrupt."""
    asleep = threading.Event()

    def send() -> None:
        asleep.wait()
        time.sleep(0.2)  # the loop waits for events
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    async def verb() -> int:
        asleep.set()
        await asyncio.sleep(60)
        return 0

    threading.Thread(target=send, daemon=True).start()
    with Interruption() as interruption, pytest.raises(asyncio.CancelledError):
        interruption.run(verb())
    assert interruption.received is signal.SIGTERM
