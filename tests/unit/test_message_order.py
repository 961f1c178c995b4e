"""Tests of the messages that are permitted in each state of a receiver, against a table of states and messages."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from pageferry.errors import ProtocolError
from pageferry.host.state_machine import WrongState
from pageferry.migration.message_order import MessageOrder, ReceiverState
from pageferry.migration.transport import messages
from pageferry.migration.transport.messages import Message

REGIONS = 2
NOTHING = messages.Populated(large=0, small=0, failed=0, seconds=0.0)
REPORT: dict[str, Any] = {"minor_faults": 0, "major_faults": 0, "large_pages": 0, "fallbacks": 0, "units": []}
EXAMPLES: dict[type[Message], Message] = {
    messages.Hello: messages.Hello(
        version=messages.VERSION,
        migration="0" * 32,
        kind="arena",
        name="here",
        details={},
        regions=[messages.RegionInfo(name="arena", length=4096, page_size=4096)],
        streams=1,
        codec="none",
        populate="none",
        keep_large=False,
        mode="hybrid",
    ),
    messages.Welcome: messages.Welcome(token=bytes(16)),
    messages.LargePages: messages.LargePages(region=0, units=b""),
    messages.Round: messages.Round(number=1),
    messages.RoundDone: messages.RoundDone(number=1),
    messages.Hot: messages.Hot(region=0, units=b""),
    messages.Missing: messages.Missing(region=0, data=b"", last=True),
    messages.State: messages.State(data=b"state", ahead=False),
    messages.StateEnd: messages.StateEnd(length=5, digest=bytes(32)),
    messages.Ready: messages.Ready(load=0.0, populate=0.0, populated=NOTHING),
    messages.Commit: messages.Commit(),
    messages.Running: messages.Running(resume=0.0),
    messages.Arrived: messages.Arrived(requests=0, service=0.0, longest=0.0, waits=[], seconds=0.0),
    messages.Report: messages.Report(populated=NOTHING, **REPORT),
    messages.Done: messages.Done(),
    messages.Recover: messages.Recover(version=messages.VERSION, migration="0" * 32),
    messages.Outcome: messages.Outcome(owner="source", complete=False),
    messages.Serve: messages.Serve(streams=1),
}
"""One message of each type, except the types that the channel handles (Alive, Abort)."""

LARGE, HOT, MISSING = (
    [messages.LargePages(region=number, units=b"") for number in range(REGIONS)],
    [messages.Hot(region=number, units=b"") for number in range(REGIONS)],
    [messages.Missing(region=number, data=b"", last=True) for number in range(REGIONS)],
)
ROUNDS = [*LARGE, EXAMPLES[messages.Round], EXAMPLES[messages.RoundDone]]
LOADING = [*ROUNDS, EXAMPLES[messages.State], EXAMPLES[messages.StateEnd]]
READY = [*LOADING, EXAMPLES[messages.Ready]]
RESUMING = [*READY, EXAMPLES[messages.Commit]]
RUNNING = [*RESUMING, EXAMPLES[messages.Running]]
REPORTED = [*RUNNING, EXAMPLES[messages.Report]]
PATHS: dict[ReceiverState, list[Message]] = {
    ReceiverState.SETUP: [],
    ReceiverState.ROUNDS: ROUNDS,
    ReceiverState.HOT: [*ROUNDS, HOT[0]],
    ReceiverState.MISSING: [*ROUNDS, MISSING[0]],
    ReceiverState.STATE: [*ROUNDS, *HOT],
    ReceiverState.LOADING: LOADING,
    ReceiverState.READY: READY,
    ReceiverState.RESUMING: RESUMING,
    ReceiverState.RUNNING: RUNNING,
    ReceiverState.REPORTED: REPORTED,
    ReceiverState.ENDED: [*REPORTED, EXAMPLES[messages.Done]],
}
"""Messages, received or sent, that lead to each state, in order."""

RECEIVED: dict[ReceiverState, list[type[Message]]] = {
    ReceiverState.SETUP: [messages.LargePages],
    ReceiverState.ROUNDS: [messages.Round, messages.Hot, messages.Missing, messages.State, messages.StateEnd],
    ReceiverState.HOT: [messages.Hot],
    ReceiverState.MISSING: [messages.Missing],
    ReceiverState.STATE: [messages.State, messages.StateEnd],
    ReceiverState.READY: [messages.Commit],
    ReceiverState.REPORTED: [messages.Done],
}
"""Messages that the source may send in each state."""

SENT: dict[ReceiverState, list[type[Message]]] = {
    ReceiverState.ROUNDS: [messages.RoundDone],
    ReceiverState.LOADING: [messages.Ready],
    ReceiverState.RESUMING: [messages.Running],
    ReceiverState.RUNNING: [messages.Arrived, messages.Report],
}
"""Messages that the receiver may send in each state."""

OURS = (messages.RoundDone, messages.Ready, messages.Running, messages.Arrived, messages.Report)


def order_in(state: ReceiverState) -> MessageOrder:
    order = MessageOrder(REGIONS, "hybrid")
    for message in PATHS[state]:
        if isinstance(message, OURS):
            order.send(message)
        else:
            order.receive(message)  # type: ignore[arg-type]  # one of AnyMessage
    assert order.state is state
    return order


def following(kind: type[Message], state: ReceiverState) -> Any:
    """Return a message of type `kind`, for the region that the receiver expects next in `state`."""
    if state in (ReceiverState.HOT, ReceiverState.MISSING):
        return {messages.Hot: HOT[1], messages.Missing: MISSING[1]}.get(kind, EXAMPLES[kind])
    return EXAMPLES[kind]


def test_table_names_every_state_and_message() -> None:
    assert set(PATHS) == set(ReceiverState)
    assert set(EXAMPLES) == set(get_args(messages.AnyMessage)) - {messages.Alive, messages.Abort}


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("state", ReceiverState)
def test_message_is_received_in_its_states_and_refused_in_all_others(state: ReceiverState, kind: type[Message]) -> None:
    order = order_in(state)
    if kind in RECEIVED.get(state, []):
        assert kind.__name__ in order.expected
        order.receive(following(kind, state))
    else:
        with pytest.raises(ProtocolError, match=rf"^the peer sent {kind.__name__} (instead of|during the transfer)"):
            order.receive(following(kind, state))
        assert order.state is state


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("state", ReceiverState)
def test_message_is_sent_in_its_states_only(state: ReceiverState, kind: type[Message]) -> None:
    order = order_in(state)
    if kind in SENT.get(state, []):
        order.send(EXAMPLES[kind])
    else:
        with pytest.raises(WrongState):
            order.send(EXAMPLES[kind])
        assert order.state is state


@pytest.mark.parametrize("kind", [messages.LargePages, messages.Hot, messages.Missing])
@pytest.mark.parametrize("region", [1, REGIONS, 63])
def test_region_out_of_order_is_refused(kind: type[Any], region: int) -> None:
    order = order_in(ReceiverState.SETUP if kind is messages.LargePages else ReceiverState.ROUNDS)
    fields: dict[str, Any] = {"data": b"", "last": True} if kind is messages.Missing else {"units": b""}
    with pytest.raises(ProtocolError, match=f"region {region}"):
        order.receive(kind(region=region, **fields))


def test_set_of_missing_pages_in_chunks_is_one_region() -> None:
    order = order_in(ReceiverState.ROUNDS)
    for region in range(REGIONS):
        for last in (False, False, True):
            order.receive(messages.Missing(region=region, data=b"", last=last))
    assert order.state is ReceiverState.STATE


def test_missing_pages_are_refused_in_precopy() -> None:
    order = MessageOrder(1, "precopy")
    order.receive(LARGE[0])
    with pytest.raises(ProtocolError, match="announced pre-copy"):
        order.receive(MISSING[0])
