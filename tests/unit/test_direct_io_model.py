"""Model of direct I/O under write traces for one page; every reachable state is examined.

A saver executes its steps. Between any two steps the processor may write to the page, and devices may pin the page,
write to it and complete. A pin marks the page as written and removes its write protection; later writes by the device
do neither. The steps `drain` and `pause` complete only when no I/O is in flight. Property: at the end, the copy equals
the memory. Incorrect orders of the steps must violate the property; otherwise, the model proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

REQUESTS = 2
"""Maximum number of I/O requests, which may start at any time and overlap."""


@dataclass(frozen=True)
class State:
    """State of the page, its copy, its trace and its requests."""

    step: int = 0
    memory: int = 0
    copy: int | None = None
    protected: bool = False
    marked: bool = False
    """Whether the next collection of the trace reports the page."""
    to_send: bool = False
    flight: tuple[bool, ...] = ()
    """Whether the device has written to the page, for each request that has pinned it."""
    begun: int = 0
    written: bool = False
    """Whether the processor has written to the page. It writes at most once."""
    paused: bool = False
    kept: int | None = None
    """Contents copied by the sweep of a checkpoint."""


ROUND = ("collect", "drain", "send")
PAUSE = ("pause", "collect", "send")
PRECOPY = ("install", "all", "drain", "send", *ROUND, *ROUND, *PAUSE)
HYBRID = ("install", "all", "drain", "send", *ROUND, "collect", "pause", "collect", "resume there", "send")
CHAIN = (*PRECOPY, "resume", *ROUND, *ROUND, *PAUSE)
"""Steps of a checkpoint whose trace is installed before any page is read, and of the next checkpoint.

The next checkpoint collects the trace of the first.
"""
REGISTERED = ("install", "all", "drain", "send", *ROUND, "pause", "collect", "all", "send")


def saver(state: State, name: str) -> State | None:
    """Return the state after the saver's step `name`; None if the step must wait."""
    after = replace(state, step=state.step + 1)
    match name:
        case "install":
            return replace(after, protected=True, marked=False)
        case "all":
            return replace(after, to_send=True)
        case "collect":
            return replace(after, to_send=state.to_send or state.marked, protected=True, marked=False)
        case "send":
            return replace(after, to_send=False, copy=state.memory) if state.to_send else after
        case "drain":
            return after if not state.flight else None
        case "pause":
            return replace(after, paused=True) if not state.flight else None
        case "resume":
            return replace(after, paused=False) if state.copy == state.memory else None
        case "sweep":
            return replace(after, copy=state.memory, kept=state.memory)
        case "remove trap":
            return replace(after, protected=False)
        case "protect":
            return replace(after, protected=not state.marked)
        case "compare":
            differs = state.kept != state.memory
            return replace(after, marked=state.marked or differs, protected=state.protected and not differs)
        case "resume there":
            return after
    raise ValueError(name)


def workload(state: State, *, registered: bool, requests: int) -> Iterator[State]:
    """Yield the states after each possible action of the processor and of the devices."""
    for number, written in enumerate(state.flight):
        others = state.flight[:number] + state.flight[number + 1 :]
        yield (
            replace(state, flight=others)
            if written
            else replace(state, flight=(*others, True), memory=state.memory + 1)
        )
    if state.paused:
        return
    trapped = replace(state, protected=False, marked=state.marked or state.protected)
    if not state.written:
        yield replace(trapped, written=True, memory=state.memory + 1)
    if state.begun < requests:
        # A registered buffer was pinned permanently before the first step.
        pinned = state if registered else trapped
        yield replace(pinned, begun=state.begun + 1, flight=(*state.flight, False))


def wrong(order: tuple[str, ...], *, registered: bool = False, requests: int = REQUESTS) -> list[State]:
    """Return the final states in which the copy differs from the memory."""
    first = State()
    seen, waiting, found = {first}, [first], []
    ended = 0
    while waiting:
        state = waiting.pop()
        if state.step == len(order):
            ended += 1
            if state.copy != state.memory:
                found.append(state)
            continue
        following = [after for after in (saver(state, order[state.step]),) if after is not None]
        following += workload(state, registered=registered, requests=requests)
        for after in following:
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    assert ended
    return found


@pytest.mark.parametrize("order", [PRECOPY, HYBRID, CHAIN], ids=["pre-copy", "hybrid", "chain"])
def test_no_write_is_lost(order: tuple[str, ...]) -> None:
    assert wrong(order) == []


def without_drain(order: tuple[str, ...], number: int) -> tuple[str, ...]:
    """Return the steps in `order` without drain `number`, counted from 0."""
    places = [place for place, name in enumerate(order) if name == "drain"]
    return order[: places[number]] + order[places[number] + 1 :]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_drain_is_needed(number: int) -> None:
    assert wrong(without_drain(PRECOPY, number))


@pytest.mark.parametrize("number", [0, 1])
def test_every_drain_of_a_hybrid_migration_is_needed(number: int) -> None:
    assert wrong(without_drain(HYBRID, number))


def test_drain_before_the_collection_loses_writes() -> None:
    early = ("drain", "collect", "send")
    assert wrong(("install", "all", "drain", "send", *early, *PAUSE))


def test_drain_before_the_trace_is_installed_loses_writes() -> None:
    assert wrong(("drain", "install", "all", "send", *PAUSE))


def test_registered_buffer_must_be_sent_in_the_pause() -> None:
    assert wrong(REGISTERED, registered=True) == []
    assert wrong(PRECOPY, registered=True)


def test_exchanging_a_trap_for_a_trace_misses_a_pin() -> None:
    """A range can have only one registration, so an exchange leaves a gap. With direct I/O, savers avoid exchanges."""
    trapped = ("install", "pause", "collect", "sweep", "resume")
    exchange = (*trapped, "remove trap", "protect", "compare", *ROUND, *PAUSE)
    assert wrong(exchange, requests=0) == []
    assert wrong(exchange)
