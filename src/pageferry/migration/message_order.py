"""Order of the messages of a migration, enforced by the destination: a state machine of the receiver.

`docs/protocol.md` shows the same order. `Abort` and `Alive` may be received in every state, and are handled by the
channel.
"""

from __future__ import annotations

from enum import StrEnum

from pageferry.errors import ProtocolError
from pageferry.host.state_machine import WrongState
from pageferry.migration.transport.messages import (
    AnyMessage,
    Arrived,
    Commit,
    Done,
    Hot,
    LargePages,
    Message,
    Missing,
    Mode,
    Ready,
    Report,
    Round,
    RoundDone,
    Running,
    State,
    StateEnd,
)


class ReceiverState(StrEnum):
    """State of a receiver that has accepted a migration."""

    SETUP = "set-up"
    """LargePages is expected for each region, in order."""
    ROUNDS = "rounds"
    """Rounds are received. The device state may begin before the last round."""
    HOT = "hot"
    """All rounds have been received. Hot is expected for each remaining region, in order."""
    MISSING = "missing"
    """The sets of missing pages are received, in the order of the regions (post-copy)."""
    STATE = "state"
    """All pages have been received, or listed as missing. The remaining device state follows."""
    LOADING = "loading"
    """The state is complete. The source waits for Ready."""
    READY = "ready"
    """The source may commit."""
    RESUMING = "resuming"
    """The source has committed, and waits for Running."""
    RUNNING = "running"
    """The workload runs at the destination. The source waits for the report."""
    REPORTED = "reported"
    ENDED = "ended"


_RECEIVED: dict[ReceiverState, dict[type[Message], ReceiverState]] = {
    ReceiverState.SETUP: {LargePages: ReceiverState.SETUP},
    ReceiverState.ROUNDS: {
        Round: ReceiverState.ROUNDS,
        State: ReceiverState.ROUNDS,
        Hot: ReceiverState.HOT,
        Missing: ReceiverState.MISSING,
        StateEnd: ReceiverState.LOADING,
    },
    ReceiverState.HOT: {Hot: ReceiverState.HOT},
    ReceiverState.MISSING: {Missing: ReceiverState.MISSING},
    ReceiverState.STATE: {State: ReceiverState.STATE, StateEnd: ReceiverState.LOADING},
    ReceiverState.READY: {Commit: ReceiverState.RESUMING},
    ReceiverState.REPORTED: {Done: ReceiverState.ENDED},
}
"""Next state, by current state and type of the received message."""

_AFTER_LAST_REGION = {
    ReceiverState.SETUP: ReceiverState.ROUNDS,
    ReceiverState.HOT: ReceiverState.STATE,
    ReceiverState.MISSING: ReceiverState.STATE,
}
"""Next state after the messages for all regions."""

_SENT: dict[ReceiverState, dict[type[Message], ReceiverState]] = {
    ReceiverState.ROUNDS: {RoundDone: ReceiverState.ROUNDS},
    ReceiverState.LOADING: {Ready: ReceiverState.READY},
    ReceiverState.RESUMING: {Running: ReceiverState.RUNNING},
    ReceiverState.RUNNING: {Arrived: ReceiverState.RUNNING, Report: ReceiverState.REPORTED},
}
"""Next state, by current state and type of the sent message."""


class MessageOrder:
    """State of the receiver of one migration, once the page streams are connected. `regions`: number of regions."""

    def __init__(self, regions: int, mode: Mode) -> None:
        self.state = ReceiverState.SETUP
        self._regions = regions
        self._mode = mode
        self._region = 0
        """Expected region of the next message, in states with messages per region."""

    @property
    def expected(self) -> str:
        """Names of the messages that may be received next, for an error message."""
        kinds = [kind.__name__ for kind in _RECEIVED.get(self.state, {})]
        return " or ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds) or "nothing"

    def receive(self, message: AnyMessage) -> None:
        """Enter the state that follows a received message. Raises ProtocolError if the message is invalid in the
        current state."""
        kind = type(message)
        following = _RECEIVED.get(self.state, {}).get(kind)
        if following is None:
            raise self._refused(kind)
        if isinstance(message, Missing) and self._mode == "precopy":
            raise ProtocolError("the peer sent missing pages, although it has announced pre-copy")
        self.state = following
        if isinstance(message, LargePages | Hot | Missing):
            self._count(message)

    def send(self, message: Message) -> None:
        """Enter the state that follows a message about to be sent. Raises WrongState if the message is invalid in the
        current state."""
        following = _SENT.get(self.state, {}).get(type(message))
        if following is None:
            raise WrongState(f"{type(message).__name__} cannot be sent in state '{self.state}'")
        self.state = following

    def _count(self, message: LargePages | Hot | Missing) -> None:
        """Check the region of a message, and change the state after the last region."""
        if message.region != self._region:
            what = "the bitmap of huge pages" if isinstance(message, LargePages) else type(message).__name__
            raise ProtocolError(f"the peer sent {what} of region {message.region} instead of region {self._region}")
        if not isinstance(message, Missing) or message.last:
            self._region += 1
        if self._region == self._regions:
            self.state, self._region = _AFTER_LAST_REGION[self.state], 0

    def _refused(self, kind: type[Message]) -> ProtocolError:
        if len(_RECEIVED.get(self.state, {})) == 1:
            return ProtocolError(f"the peer sent {kind.__name__} instead of {self.expected}")
        return ProtocolError(f"the peer sent {kind.__name__} during the transfer instead of {self.expected}")
