"""The ownership protocol as a model, every reachable state of which is looked at.

It has both agents step by step as `migration.source` and `migration.destination` do them, what they have written down,
the messages under way, and all that can happen: an agent is killed between any two steps, fails by itself, or the link
is cut with any part of what was under way lost; and the source asks (`--recover`) as soon as it is in doubt, however
slow the destination still is. `--take-back` is left out: it is for an operator who knows better than the protocol.

In post-copy the workload runs at the destination before its pages are there. The source serves them, and `--recover`
has it serve on after anything has died; at the destination another agent can take over (`receive --resume`).

Looked for: never two that run the workload; nobody running it only where somebody can ask; an answer, whenever both
hosts live; and pages that are kept at the source until the destination has all of them, and get there in the end.
Variants of the protocol that are wrong must be caught, or the model would prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import pytest


class Source(Enum):
    """What the source's agent does next."""

    COPY = "copy"
    AWAIT_READY = "await ready"
    RECORD = "record"
    COMMIT_WORKLOAD = "commit the workload"
    SEND_COMMIT = "send commit"
    AWAIT_RUNNING = "await running"
    SERVE = "send the pages"
    AWAIT_ARRIVED = "await arrived"
    DISCARD = "discard"
    RESUME = "resume"
    FORGET = "forget the record"
    ENDED = "ended"


class Destination(Enum):
    """What the destination's agent does next."""

    AWAIT_STATE = "await state"
    AWAIT_COMMIT = "await commit"
    COMMIT_WORKLOAD = "make the workload survive"
    DECIDE = "decide"
    RESUME = "resume"
    ANSWER = "answer"
    AWAIT_PAGES = "await pages"
    NOTE_ARRIVED = "note that all pages are there"
    SAY_ARRIVED = "say so"
    AWAIT_DONE = "await done"
    DECIDE_ABORTED = "decide against it"
    ABORT = "abort"
    ENDED = "ended"


SERVING = {Source.SERVE, Source.AWAIT_ARRIVED}
GAVE_AWAY = {Source.AWAIT_RUNNING, *SERVING, Source.DISCARD, Source.ENDED}
GIVING_BACK = {Source.RESUME, Source.FORGET}
GIVING_UP = {Destination.DECIDE_ABORTED, Destination.ABORT}


@dataclass(frozen=True)
class State:
    """Everything that matters. Workloads: `runs`, `paused`, `committed`, `gone` (`workloads.lifecycle`)."""

    source: Source = Source.COPY
    here: str = "runs"
    record: bool = False
    destination: Destination = Destination.AWAIT_STATE
    there: str = "paused"
    verdict: str | None = None
    to_destination: tuple[str, ...] = ()
    to_source: tuple[str, ...] = ()
    link: bool = True
    settled: bool = False
    """The destination has forgotten the migration: the source knows."""
    withdrawn: bool = False
    """The destination had decided to run it, but its process died before anybody had told it to run."""
    ran_there: bool = False
    postcopy: bool = False
    complete: bool = False
    """Every page is at the destination."""
    arrived: bool = False
    """The destination has written that down."""

    @property
    def owners(self) -> int:
        """How many run the workload."""
        return (self.here == "runs") + (self.there == "runs")

    @property
    def died_there(self) -> bool:
        """The process that ran the workload at the destination, or was to, has been killed after the decision."""
        return (self.verdict == "committed" or self.withdrawn) and self.there == "gone"


@dataclass(frozen=True)
class Rules:
    """The protocol, and ways in which it would be wrong."""

    records_first: bool = True
    decides_first: bool = True
    decides_before_abort: bool = True
    commits_workload: bool = True
    first_decision_holds: bool = True
    returns_after_commit: bool = False
    withdraws_what_ran: bool = False
    discards_after_push: bool = False
    discards_on_decision: bool = False
    notes_arrival_first: bool = False
    takes_a_cut_for_the_end: bool = False


def decide(state: State, wanted: str, rules: Rules) -> State:
    """`Verdicts.decide`."""
    if state.verdict is None or not rules.first_decision_holds:
        return replace(state, verdict=wanted)
    return state


def source_steps(state: State, rules: Rules) -> Iterator[State]:
    """What the source's agent can do."""
    match state.source:
        case Source.COPY:
            yield send(replace(state, source=Source.AWAIT_READY, here="paused"), "state")
        case Source.RECORD:
            yield replace(state, source=Source.COMMIT_WORKLOAD, record=rules.records_first)
        case Source.COMMIT_WORKLOAD:
            here = "committed" if rules.commits_workload else state.here
            yield replace(state, source=Source.SEND_COMMIT, here=here)
        case Source.SEND_COMMIT:
            yield send(replace(state, source=Source.AWAIT_RUNNING), "commit")
        case Source.SERVE:
            after = Source.DISCARD if rules.discards_after_push else Source.AWAIT_ARRIVED
            yield send(replace(state, source=after), "pages")
        case Source.DISCARD:
            yield closed(send(replace(state, source=Source.ENDED, here="gone", record=False), "done"))
        case Source.RESUME:
            yield replace(state, source=Source.FORGET, here="runs")
        case Source.FORGET:
            yield closed(send(replace(state, source=Source.ENDED, record=False), "abort"))
    yield from source_hears(state, rules)


def source_hears(state: State, rules: Rules) -> Iterator[State]:
    """The next message from the destination, or the end of the link."""
    if state.source in (Source.ENDED, *GIVING_BACK):
        return
    expected = {
        Source.AWAIT_READY: ("ready", Source.RECORD),
        Source.AWAIT_RUNNING: ("running", Source.SERVE if state.postcopy else Source.DISCARD),
        Source.AWAIT_ARRIVED: ("arrived", Source.DISCARD),
    }
    first = state.to_source[0] if state.to_source else None
    if state.source in expected and first == expected[state.source][0]:
        yield replace(state, source=expected[state.source][1], to_source=state.to_source[1:])
    elif first == "abort" and state.source is not Source.DISCARD:
        # Also after commit: it decides before it says so.
        yield replace(state, source=Source.RESUME, to_source=state.to_source[1:])
    elif first is None and not state.link:
        yield from source_fails(state, rules)


def source_fails(state: State, rules: Rules) -> Iterator[State]:
    """It cannot go on, or is cancelled."""
    if state.source in GAVE_AWAY:
        if state.source is Source.AWAIT_RUNNING:  # OutcomeUnknown
            after = Source.RESUME if rules.returns_after_commit else Source.ENDED
            yield replace(state, source=after) if after is Source.RESUME else closed(replace(state, source=after))
        elif state.source in SERVING:  # `postcopy-paused`
            yield closed(replace(state, source=Source.ENDED))
    elif state.source not in GIVING_BACK:
        yield replace(state, source=Source.RESUME)


def destination_steps(state: State, rules: Rules) -> Iterator[State]:
    """What the destination's agent can do."""
    early, late = (Destination.DECIDE, Destination.RESUME)
    if not rules.decides_first:
        early, late = late, early
    match state.destination:
        case Destination.COMMIT_WORKLOAD:
            yield replace(state, destination=early, there="committed")
        case Destination.DECIDE:
            decided = decide(state, "committed", rules)
            after = Destination.RESUME if rules.decides_first else Destination.ANSWER
            won = decided.verdict == "committed"
            yield replace(decided, destination=after if won else Destination.DECIDE_ABORTED)
        case Destination.RESUME if state.there == "gone":
            yield replace(state, destination=Destination.ABORT, verdict="aborted", withdrawn=True)
        case Destination.RESUME:
            after = Destination.ANSWER if rules.decides_first else Destination.DECIDE
            yield replace(state, destination=after, there="runs", ran_there=True)
        case Destination.ANSWER if rules.withdraws_what_ran and state.there == "gone":
            yield replace(state, destination=Destination.ABORT, verdict="aborted", withdrawn=True)
        case Destination.ANSWER:
            too_soon = rules.notes_arrival_first and state.postcopy
            after = Destination.AWAIT_PAGES if state.postcopy and not too_soon else Destination.AWAIT_DONE
            answered = send(replace(state, destination=after, arrived=state.arrived or too_soon), "running")
            yield send(answered, "arrived") if too_soon else answered
        case Destination.NOTE_ARRIVED:
            yield replace(state, destination=Destination.SAY_ARRIVED, arrived=True)
        case Destination.SAY_ARRIVED:
            yield send(replace(state, destination=Destination.AWAIT_DONE), "arrived")
        case Destination.ENDED if state.there == "runs" and state.postcopy and not state.arrived:  # `receive --resume`
            after = Destination.NOTE_ARRIVED if state.complete else Destination.AWAIT_PAGES
            yield replace(state, destination=after, to_destination=())
        case Destination.DECIDE_ABORTED if rules.decides_before_abort:
            decided = decide(state, "aborted", rules)
            if decided.verdict == "aborted":
                yield replace(decided, destination=Destination.ABORT)
            else:
                for there in after_the_end(decided):
                    yield closed(replace(decided, destination=Destination.ENDED, there=there))
        case Destination.DECIDE_ABORTED:
            yield replace(state, destination=Destination.ABORT)
        case Destination.ABORT:
            yield closed(send(replace(state, destination=Destination.ENDED, there="gone"), "abort"))
    yield from destination_hears(state, rules)


def after_the_end(state: State) -> set[str]:
    """What may become of the workload when the destination's agent ends.

    An arena goes with its process; a guest has a guardian from the time it was made to survive, which does what was
    decided; one that runs, runs on.
    """
    decided = state.there == "committed" and state.verdict == "committed"
    return {"gone", "runs" if decided or state.there == "runs" else "gone"}


def destination_hears(state: State, rules: Rules) -> Iterator[State]:
    """The next message from the source, or the end of the link."""
    first = state.to_destination[0] if state.to_destination else None
    rest = replace(state, to_destination=state.to_destination[1:])
    match state.destination, first:
        case Destination.AWAIT_STATE, "state":
            yield send(replace(rest, destination=Destination.AWAIT_COMMIT, complete=not state.postcopy), "ready")
        case Destination.AWAIT_COMMIT, "commit":
            yield replace(rest, destination=Destination.COMMIT_WORKLOAD)
        case ((Destination.AWAIT_STATE | Destination.AWAIT_COMMIT), "abort"):
            yield replace(rest, destination=Destination.DECIDE_ABORTED)
        case Destination.AWAIT_PAGES, "pages":
            yield replace(rest, destination=Destination.NOTE_ARRIVED, complete=True)
        case Destination.AWAIT_PAGES, None if not state.link and rules.takes_a_cut_for_the_end:
            yield replace(state, destination=Destination.NOTE_ARRIVED)
        case Destination.AWAIT_DONE, "done":
            yield closed(replace(rest, destination=Destination.ENDED, settled=True))
        case ((Destination.AWAIT_STATE | Destination.AWAIT_COMMIT), None) if not state.link:
            yield replace(state, destination=Destination.DECIDE_ABORTED)
        case Destination.AWAIT_DONE, None if not state.link:
            yield replace(state, destination=Destination.ENDED)


def closed(state: State) -> State:
    """An agent that ends closes its connection: what it has sent still arrives."""
    return replace(state, link=False)


def send(state: State, message: str) -> State:
    """Put a message on its way; into nowhere where the link is cut."""
    if not state.link:
        return state
    if message in ("state", "commit", "pages", "done") or (message == "abort" and state.source is Source.ENDED):
        return replace(state, to_destination=(*state.to_destination, message))
    return replace(state, to_source=(*state.to_source, message))


def recovery(state: State, rules: Rules) -> Iterator[State]:
    """`pageferry migrate --recover`, answered by a receiver on the destination's host; answers may get lost before."""
    if state.source is not Source.ENDED or not state.record:
        return
    if state.settled:
        return  # `unknown`
    decided = decide(state, "aborted", rules)
    if decided.verdict == "committed" and state.postcopy and not (state.arrived or rules.discards_on_decision):
        # Only who has the pager can go on; another receiver says who it must be.
        if state.destination is Destination.AWAIT_PAGES:
            yield replace(decided, source=Source.SERVE, link=True, to_destination=(), to_source=())
    elif decided.verdict == "committed":
        yield replace(decided, here="gone", record=False)
    else:
        yield replace(decided, here="runs", record=False)


def failures(state: State, rules: Rules) -> Iterator[State]:
    """What can go wrong in a state: killed agents, own failures, a cut link."""
    if state.source is not Source.ENDED:
        here = "runs" if state.here == "paused" else state.here  # `Lifecycle.lost`
        yield from cut(replace(state, source=Source.ENDED, here=here))
        yield from source_fails(state, rules)
    if state.destination is not Destination.ENDED:
        for there in after_the_end(state):
            yield from cut(replace(state, destination=Destination.ENDED, there=there))
        if state.there in ("committed", "runs"):  # its process is killed, and the agent lives
            yield replace(state, there="gone")
        if state.destination not in GIVING_UP:
            yield replace(state, destination=Destination.DECIDE_ABORTED)
    if state.link:
        yield from cut(state)


def cut(state: State) -> Iterator[State]:
    """The link goes, and any tail of what was under way with it."""
    for kept in range(len(state.to_destination) + 1):
        for also in range(len(state.to_source) + 1):
            yield replace(
                state, link=False, to_destination=state.to_destination[:kept], to_source=state.to_source[:also]
            )


def steps(state: State, rules: Rules) -> Iterator[State]:
    """Everything that happens without a failure."""
    yield from source_steps(state, rules)
    yield from destination_steps(state, rules)
    yield from recovery(state, rules)


def reachable(rules: Rules) -> dict[State, State | None]:
    """All states that can come about, each with the one before it."""
    found: dict[State, State | None] = {State(): None, State(postcopy=True): None}
    waiting = list(found)
    while waiting:
        state = waiting.pop()
        for after in (*steps(state, rules), *failures(state, rules)):
            if after not in found:
                found[after] = state
                waiting.append(after)
    return found


def wrong(state: State, rules: Rules) -> str | None:
    """What is wrong with a state, if anything."""
    if state.owners > 1:
        return "two run it"
    if state.there == "runs" and state.verdict != "committed":
        return "it runs there undecided"
    if state.here == "runs" and state.verdict == "committed":
        return "it runs here, and was decided to run there"
    if state.withdrawn and state.ran_there:
        return "it is given back, and has run there"
    if state.here == "gone" and state.verdict == "committed" and not state.complete:
        return "pages are gone that the destination does not have"
    if state.arrived and not state.complete:
        return "the destination says that it has what it does not have"
    at_an_end = next(steps(state, rules), None) is None
    # Killed there after the decision: as any workload whose process is killed.
    if at_an_end and state.owners == 0 and not state.died_there:
        return "nobody runs it, and nobody can ask"
    if at_an_end and state.there == "runs" and not state.complete:
        return "it waits for pages that nobody will send"
    return None


def history(states: dict[State, State | None], state: State | None) -> str:
    """How a state came about."""
    lines = []
    while state is not None:
        lines.append(str(state))
        state = states[state]
    return "\n".join(reversed(lines))


def test_there_is_never_more_than_one_owner_and_never_none_for_good() -> None:
    states = reachable(Rules())
    assert len(states) > 200
    for state in states:
        problem = wrong(state, Rules())
        assert problem is None, f"{problem}:\n{history(states, state)}"
    # The states that matter do come about.
    assert any(state.record and state.source is Source.ENDED and state.verdict == "committed" for state in states)
    assert any(state.record and state.source is Source.ENDED and state.verdict is None for state in states)
    assert any(state.there == "runs" and not state.complete and not state.link for state in states)
    assert any(state.postcopy and state.settled for state in states)


def test_without_further_failures_everything_comes_to_an_end() -> None:
    """No step leads back, so asking is enough: whatever happened before, there is an answer."""
    rules = Rules()
    states = reachable(rules)
    depth: dict[State, int] = {}

    def measure(state: State) -> int:
        if state not in depth:
            depth[state] = -1
            depth[state] = 1 + max((measure(after) for after in steps(state, rules)), default=0)
        assert depth[state] > 0, "a cycle"
        return depth[state]

    for state in states:
        measure(state)
    ends = [state for state in states if next(steps(state, rules), None) is None]
    # In post-copy the source keeps its pages for a workload that has been killed there: nobody says that it is over.
    assert all(not state.record or state.here == "runs" or (state.postcopy and state.died_there) for state in ends)


def test_it_goes_from_the_source_only_where_the_destination_has_decided_for_itself() -> None:
    gone = [state for state in reachable(Rules()) if state.here == "gone"]
    assert all(state.verdict == "committed" or state.withdrawn for state in gone)


def test_what_died_before_it_ran_is_given_back() -> None:
    """Unless somebody has asked in between, and was told that it is the destination's."""
    withdrawn = [state for state in reachable(Rules()) if state.withdrawn]
    assert any(state.here == "runs" for state in withdrawn)
    assert all(state.there == "gone" and not state.ran_there for state in withdrawn)


@pytest.mark.parametrize(
    "broken",
    [
        Rules(records_first=False),
        Rules(decides_first=False),
        Rules(decides_before_abort=False),
        Rules(commits_workload=False),
        Rules(first_decision_holds=False),
        Rules(returns_after_commit=True),
        Rules(withdraws_what_ran=True),
        Rules(discards_after_push=True),
        Rules(discards_on_decision=True),
        Rules(notes_arrival_first=True),
        Rules(takes_a_cut_for_the_end=True),
    ],
    ids=lambda rules: next(name for name in Rules.__annotations__ if getattr(rules, name) != getattr(Rules(), name)),
)
def test_a_protocol_that_is_wrong_is_caught(broken: Rules) -> None:
    assert any(wrong(state, broken) for state in reachable(broken))
