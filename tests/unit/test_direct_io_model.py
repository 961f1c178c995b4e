"""Direct I/O and write traces as a model of one page, every reachable state of which is examined.

A saver goes through its steps; between any two of them a processor writes, and devices pin the page, write to it and
end. A pin marks the page as written and removes its protection, what the device writes later does neither. `drain` and
`pause` complete when no I/O is in flight. Looked for: at the end the copy is what memory holds. Orders that are wrong
must be caught, or the model would prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

REQUESTS = 2
"""That may begin, at any time, and be in flight at once."""


@dataclass(frozen=True)
class State:
    """Of the page, its copy, its trace and its requests."""

    step: int = 0
    memory: int = 0
    copy: int | None = None
    protected: bool = False
    marked: bool = False
    """The next collection reports the page."""
    to_send: bool = False
    flight: tuple[bool, ...] = ()
    """Requests that have pinned the page: whether the device has written."""
    begun: int = 0
    written: bool = False
    """By the processor, once."""
    paused: bool = False
    kept: int | None = None
    """What the sweep of a checkpoint copied."""


ROUND = ("collect", "drain", "send")
PAUSE = ("pause", "collect", "send")
PRECOPY = ("install", "all", "drain", "send", *ROUND, *ROUND, *PAUSE)
HYBRID = ("install", "all", "drain", "send", *ROUND, "collect", "pause", "collect", "resume there", "send")
CHAIN = (*PRECOPY, "resume", *ROUND, *ROUND, *PAUSE)
"""A checkpoint whose trace is on before anything is read, and the next one, which takes the trace up."""
REGISTERED = ("install", "all", "drain", "send", *ROUND, "pause", "collect", "all", "send")


def saver(state: State, name: str) -> State | None:
    """The state after a step; None where it has to wait."""
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
    """What a processor and devices may do next."""
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
        # Into a registered buffer: pinned once, before everything, and for good.
        pinned = state if registered else trapped
        yield replace(pinned, begun=state.begun + 1, flight=(*state.flight, False))


def wrong(order: tuple[str, ...], *, registered: bool = False, requests: int = REQUESTS) -> list[State]:
    """Ends at which the copy is not what memory holds."""
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
    """An order with one drain left out."""
    places = [place for place, name in enumerate(order) if name == "drain"]
    return order[: places[number]] + order[places[number] + 1 :]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_drain_is_needed(number: int) -> None:
    assert wrong(without_drain(PRECOPY, number))


@pytest.mark.parametrize("number", [0, 1])
def test_every_drain_of_a_hybrid_migration_is_needed(number: int) -> None:
    assert wrong(without_drain(HYBRID, number))


def test_a_drain_before_the_collection_is_too_early() -> None:
    early = ("drain", "collect", "send")
    assert wrong(("install", "all", "drain", "send", *early, *PAUSE))


def test_a_drain_before_the_trace_is_installed_is_too_early() -> None:
    assert wrong(("drain", "install", "all", "send", *PAUSE))


def test_a_registered_buffer_is_sent_in_the_pause() -> None:
    assert wrong(REGISTERED, registered=True) == []
    assert wrong(PRECOPY, registered=True)


def test_a_page_can_be_pinned_while_a_trap_is_exchanged_for_a_trace() -> None:
    """So a trace is not left that way where there is direct I/O: a memory range has one registration at a time."""
    trapped = ("install", "pause", "collect", "sweep", "resume")
    exchange = (*trapped, "remove trap", "protect", "compare", *ROUND, *PAUSE)
    assert wrong(exchange, requests=0) == []
    assert wrong(exchange)
