"""Model of the ownership protocol; every reachable state is examined.

The model contains both agents with the steps of `migration.commit` and `migration.takeover`, their persistent
records, the messages in transit, and all failures: an agent is killed between any two steps or fails by itself, or the
link is cut and any suffix of the messages in transit is lost. The source runs `--recover` whenever the outcome is
unknown, in any state of the destination. The model omits `--take-back`, by which an operator overrides the protocol.

In post-copy the workload runs at the destination before all of its pages are present. The source serves the pages, and
`--recover` continues to serve them after any crash. At the destination, another agent can take over (`receive
--resume`).

Properties:
- At most one process runs the workload. If no process runs the workload, a recovery is possible.
- A recovery ends with a reply once both hosts are up.
- The source keeps its pages until the destination has received all of them, which happens eventually.

Incorrect variants of the protocol must violate a property; otherwise, the model proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import pytest


class Source(Enum):
    """Next step of the source's agent."""

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
    """Next step of the destination's agent."""

    AWAIT_STATE = "await state"
    AWAIT_COMMIT = "await commit"
    COMMIT_WORKLOAD = "commit the workload"
    DECIDE = "decide"
    RESUME = "resume"
    ANSWER = "answer"
    AWAIT_PAGES = "await pages"
    NOTE_ARRIVED = "record that all pages are present"
    SAY_ARRIVED = "report that all pages are present"
    AWAIT_DONE = "await done"
    DECIDE_ABORTED = "decide to abort"
    ABORT = "abort"
    ENDED = "ended"


SERVING = {Source.SERVE, Source.AWAIT_ARRIVED}
GAVE_AWAY = {Source.AWAIT_RUNNING, *SERVING, Source.DISCARD, Source.ENDED}
GIVING_BACK = {Source.RESUME, Source.FORGET}
GIVING_UP = {Destination.DECIDE_ABORTED, Destination.ABORT}


@dataclass(frozen=True)
class State:
    """State of the system.

    `here`, `there`: state of the workload at the source and at the destination (`runs`, `paused`, `committed`, `gone`).
    """

    source: Source = Source.COPY
    here: str = "runs"
    record: bool = False
    destination: Destination = Destination.AWAIT_STATE
    there: str = "paused"
    decision: str | None = None
    to_destination: tuple[str, ...] = ()
    to_source: tuple[str, ...] = ()
    link: bool = True
    settled: bool = False
    """Whether the source knows that the destination has forgotten the migration."""
    withdrawn: bool = False
    """Whether the destination has withdrawn its commit: the workload's process was killed before it was resumed."""
    ran_there: bool = False
    postcopy: bool = False
    complete: bool = False
    """Whether the destination has received every page."""
    arrived: bool = False
    """Whether the destination has recorded that it has received every page."""

    @property
    def owners(self) -> int:
        """Number of processes that run the workload."""
        return (self.here == "runs") + (self.there == "runs")

    @property
    def died_there(self) -> bool:
        """Whether the process of the workload at the destination was killed after the decision."""
        return (self.decision == "committed" or self.withdrawn) and self.there == "gone"


@dataclass(frozen=True)
class Rules:
    """Rules of the protocol. Each value other than the default yields an incorrect variant."""

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
    """Return the state after a decision by the destination, as in `CommitDecisions.decide`."""
    if state.decision is None or not rules.first_decision_holds:
        return replace(state, decision=wanted)
    return state


def source_steps(state: State, rules: Rules) -> Iterator[State]:
    """Yield the states after each possible step of the source's agent."""
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
    """Yield the states after the next message from the destination, or after the loss of the link."""
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
        # Abort is valid after Commit, too: the destination records its decision before it sends Abort.
        yield replace(state, source=Source.RESUME, to_source=state.to_source[1:])
    elif first is None and not state.link:
        yield from source_fails(state, rules)


def source_fails(state: State, rules: Rules) -> Iterator[State]:
    """Yield the states after an error or a cancellation at the source."""
    if state.source in GAVE_AWAY:
        if state.source is Source.AWAIT_RUNNING:  # OutcomeUnknown
            after = Source.RESUME if rules.returns_after_commit else Source.ENDED
            yield replace(state, source=after) if after is Source.RESUME else closed(replace(state, source=after))
        elif state.source in SERVING:  # `postcopy-paused`
            yield closed(replace(state, source=Source.ENDED))
    elif state.source not in GIVING_BACK:
        yield replace(state, source=Source.RESUME)


def destination_steps(state: State, rules: Rules) -> Iterator[State]:
    """Yield the states after each possible step of the destination's agent."""
    early, late = (Destination.DECIDE, Destination.RESUME)
    if not rules.decides_first:
        early, late = late, early
    match state.destination:
        case Destination.COMMIT_WORKLOAD:
            yield replace(state, destination=early, there="committed")
        case Destination.DECIDE:
            decided = decide(state, "committed", rules)
            after = Destination.RESUME if rules.decides_first else Destination.ANSWER
            won = decided.decision == "committed"
            yield replace(decided, destination=after if won else Destination.DECIDE_ABORTED)
        case Destination.RESUME if state.there == "gone":
            yield replace(state, destination=Destination.ABORT, decision="aborted", withdrawn=True)
        case Destination.RESUME:
            after = Destination.ANSWER if rules.decides_first else Destination.DECIDE
            yield replace(state, destination=after, there="runs", ran_there=True)
        case Destination.ANSWER if rules.withdraws_what_ran and state.there == "gone":
            yield replace(state, destination=Destination.ABORT, decision="aborted", withdrawn=True)
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
            if decided.decision == "aborted":
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
    """Return the possible states of the workload after the end of the destination's agent.

    An arena ends with the agent, because both are one process. A paused guest that can outlive the agent has a
    guardian, which executes the decision. A running guest keeps running.
    """
    decided = state.there == "committed" and state.decision == "committed"
    return {"gone", "runs" if decided or state.there == "runs" else "gone"}


def destination_hears(state: State, rules: Rules) -> Iterator[State]:
    """Yield the states after the next message from the source, or after the loss of the link."""
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
    """Return the state after an agent that ends has closed the connection; messages in transit are still delivered."""
    return replace(state, link=False)


def send(state: State, message: str) -> State:
    """Return the state with a message added to those in transit; the message is lost if the link is cut."""
    if not state.link:
        return state
    if message in ("state", "commit", "pages", "done") or (message == "abort" and state.source is Source.ENDED):
        return replace(state, to_destination=(*state.to_destination, message))
    return replace(state, to_source=(*state.to_source, message))


def recovery(state: State, rules: Rules) -> Iterator[State]:
    """Yield the states after `pageferry migrate --recover`, whose reply may be lost."""
    if state.source is not Source.ENDED or not state.record:
        return
    if state.settled:
        return  # the destination replies `unknown`
    decided = decide(state, "aborted", rules)
    if decided.decision == "committed" and state.postcopy and not (state.arrived or rules.discards_on_decision):
        # Only the process with the pager can continue. Another receiver replies with its own identity.
        if state.destination is Destination.AWAIT_PAGES:
            yield replace(decided, source=Source.SERVE, link=True, to_destination=(), to_source=())
    elif decided.decision == "committed":
        yield replace(decided, here="gone", record=False)
    else:
        yield replace(decided, here="runs", record=False)


def failures(state: State, rules: Rules) -> Iterator[State]:
    """Yield the states after each possible failure: killed agents, errors, a cut link."""
    if state.source is not Source.ENDED:
        here = "runs" if state.here == "paused" else state.here  # `Lifecycle.lost`
        yield from cut(replace(state, source=Source.ENDED, here=here))
        yield from source_fails(state, rules)
    if state.destination is not Destination.ENDED:
        for there in after_the_end(state):
            yield from cut(replace(state, destination=Destination.ENDED, there=there))
        if state.there in ("committed", "runs"):  # the process of the workload is killed, and the agent continues
            yield replace(state, there="gone")
        if state.destination not in GIVING_UP:
            yield replace(state, destination=Destination.DECIDE_ABORTED)
    if state.link:
        yield from cut(state)


def cut(state: State) -> Iterator[State]:
    """Yield the states after a cut of the link that loses any suffix of the messages in transit."""
    for kept in range(len(state.to_destination) + 1):
        for also in range(len(state.to_source) + 1):
            yield replace(
                state, link=False, to_destination=state.to_destination[:kept], to_source=state.to_source[:also]
            )


def steps(state: State, rules: Rules) -> Iterator[State]:
    """Yield the states after each possible step without failures."""
    yield from source_steps(state, rules)
    yield from destination_steps(state, rules)
    yield from recovery(state, rules)


def reachable(rules: Rules) -> dict[State, State | None]:
    """Return all reachable states, each with the state from which it was reached."""
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
    """Return the property that a state violates; None if it violates none."""
    if state.owners > 1:
        return "two processes run the workload"
    if state.there == "runs" and state.decision != "committed":
        return "the workload runs at the destination without a decision"
    if state.here == "runs" and state.decision == "committed":
        return "the workload runs at the source although the destination has committed"
    if state.withdrawn and state.ran_there:
        return "the workload returns to the source although it has run at the destination"
    if state.here == "gone" and state.decision == "committed" and not state.complete:
        return "the source has discarded pages that the destination lacks"
    if state.arrived and not state.complete:
        return "the destination reports pages that it lacks"
    at_an_end = next(steps(state, rules), None) is None
    # If its process is killed after the decision, the workload is lost, as it would be without a migration.
    if at_an_end and state.owners == 0 and not state.died_there:
        return "no process runs the workload, and no recovery is possible"
    if at_an_end and state.there == "runs" and not state.complete:
        return "the workload waits for pages that no process will send"
    return None


def history(states: dict[State, State | None], state: State | None) -> str:
    """Return the sequence of states that leads to a state."""
    lines = []
    while state is not None:
        lines.append(str(state))
        state = states[state]
    return "\n".join(reversed(lines))


def test_at_most_one_owner_and_never_permanently_none() -> None:
    states = reachable(Rules())
    assert len(states) > 200
    for state in states:
        problem = wrong(state, Rules())
        assert problem is None, f"{problem}:\n{history(states, state)}"
    # The model reaches recovery with and without a decision, post-copy after a lost link, and complete post-copy.
    assert any(state.record and state.source is Source.ENDED and state.decision == "committed" for state in states)
    assert any(state.record and state.source is Source.ENDED and state.decision is None for state in states)
    assert any(state.there == "runs" and not state.complete and not state.link for state in states)
    assert any(state.postcopy and state.settled for state in states)


def test_protocol_terminates_without_further_failures() -> None:
    """The steps have no cycle, so repeated recovery always ends with a reply."""
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
    # In post-copy, no message reports to the source that the workload was killed; the source then keeps its pages.
    assert all(not state.record or state.here == "runs" or (state.postcopy and state.died_there) for state in ends)


def test_source_discards_only_after_the_destination_has_committed() -> None:
    gone = [state for state in reachable(Rules()) if state.here == "gone"]
    assert all(state.decision == "committed" or state.withdrawn for state in gone)


def test_workload_killed_before_it_ran_returns_to_the_source() -> None:
    """The workload does not return if, before the kill, a recovery has found that the destination owns it."""
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
def test_wrong_protocol_violates_a_property(broken: Rules) -> None:
    assert any(wrong(state, broken) for state in reachable(broken))
