"""Errors of pageferry, with the exit codes of commands that fail with them.

::

    PageferryError (1)
    ├── UsageError (2)              a value or a combination of values is invalid; also a ValueError
    │   └── WrongType (2)           a value has the wrong type; also a TypeError
    ├── UnsupportedError (3)        the kernel, the user's permissions or QEMU do not allow the operation
    ├── WorkloadError (10)          a workload cannot be managed, or did not respond as required
    │   ├── NoSuchWorkload (11)     no workload of this name is registered on this host
    │   ├── NameInUse (12)          a workload of this name is already registered
    │   ├── WorkloadDied (13)       the workload exited during the operation
    │   ├── ShutdownTimeout (14)    the guest did not shut down in time, and keeps running
    │   └── AddressInUse (15)       an address in the command line of a guest is in use; nothing was started
    ├── CheckpointError (30)        no image was written; the workload keeps running
    ├── ImageError (31)             an image is missing, damaged, incomplete or of an unsupported version
    │   └── WrongKey (35)           a key is missing, does not open the image, or the image is not encrypted
    ├── StoreError (34)             an object store cannot be reached, or rejects a request
    ├── RestoreError (32)           a workload cannot be restored, or waits for contents that cannot be read
    │   └── DisksDiffer (33)        disks are not known to be as they were at the checkpoint
    ├── FleetError (40)             the cluster or an agent of a host cannot be reached, or refuses a request
    │   ├── ActorLost (42)          a movable actor has exited: the call may have been executed or not
    │   ├── CallTimeout (43)        a call of a movable actor has no result in time
    │   └── FleetIncomplete (41)    a plan has ended, and some of its workloads are not where it puts them
    └── MigrationError (20)         the migration failed; the workload keeps running at the source
        ├── PeerRefused (21)        the peer rejected the request
        ├── ProtocolError (22)      the peer violated the protocol
        ├── ConnectionLost (23)     the connection was lost before the commit
        ├── NotConverging (24)      the workload modifies memory faster than it can be sent
        ├── Cancelled (25)          the caller or the peer cancelled the migration
        ├── OutcomeUnknown (26)     no reply to the commit: the workload stays paused at the source
        ├── AuthenticationError (27) a certificate or a user was not accepted
        └── PostcopyPaused (28)     the workload runs at the destination and waits for pages of the source

Each message states the operation, its object, the cause and a remedy. `OutcomeUnknown` is the only error that leaves a
workload paused.

The class names the party that failed, not the operation: the caller's values, the host, the workload, the peer or the
connection, an image. `migrate`, for example, raises MigrationError for failures of the peer and the connection, and
WorkloadError for failures of the workload. `except PageferryError` catches all errors that an operation raises
deliberately. Values are checked first: after UsageError, nothing has changed.
"""

from pageferry.printable import printable


class PageferryError(Exception):
    """Base of all errors that pageferry raises deliberately."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message with control characters escaped: a peer may have sent a part of it."""
        return printable(super().__str__())


class UsageError(PageferryError, ValueError):
    """An argument is invalid, alone or in combination with others. Nothing has changed."""

    exit_code = 2


class WrongType(UsageError, TypeError):
    """An argument has the wrong type, or an option is unknown."""


class UnsupportedError(PageferryError):
    """The kernel, the user's permissions or QEMU do not allow the operation; the message states what is missing."""

    exit_code = 3


class WorkloadError(PageferryError):
    """A workload cannot be managed, or did not respond as required.

    `never_ran`: the workload was about to be resumed on this host, and has certainly not run.
    """

    exit_code = 10
    never_ran = False


class NoSuchWorkload(WorkloadError, LookupError):
    """No workload of this name is registered on this host."""

    exit_code = 11


class NameInUse(WorkloadError):
    """A running workload of this name is already registered."""

    exit_code = 12


class WorkloadDied(WorkloadError):
    """The workload exited during the operation."""

    exit_code = 13

    def __init__(self, message: str, *, never_ran: bool = False) -> None:
        super().__init__(message)
        self.never_ran = never_ran


class ShutdownTimeout(WorkloadError):
    """The guest has not shut down in time after the request (ACPI). It keeps running."""

    exit_code = 14


class AddressInUse(WorkloadError):
    """Another process listens on an address in the command line of a guest. No guest was started."""

    exit_code = 15


class MigrationError(PageferryError):
    """A migration failed. The workload keeps running at the source."""

    exit_code = 20


class PeerRefused(MigrationError):
    """The peer rejected the request; the message contains the peer's reason."""

    exit_code = 21


class ProtocolError(MigrationError):
    """The peer sent bytes or messages that the protocol does not allow in this state."""

    exit_code = 22


class ConnectionLost(MigrationError, ConnectionError):
    """The connection was lost, or the peer exited, before the commit."""

    exit_code = 23


class NotConverging(MigrationError):
    """The workload modifies memory faster than it can be sent, and rounds do not reduce the remaining pages."""

    exit_code = 24


class Cancelled(MigrationError):
    """The migration was cancelled before the commit."""

    exit_code = 25


class OutcomeUnknown(MigrationError):
    """No reply to the commit was received: the workload stays paused at the source until it is recovered.

    `pageferry.recover` requests the outcome of `migration` from `peer` (HOST:PORT). `hostname`: name to expect in the
    certificate of the peer; empty without TLS.
    """

    exit_code = 26

    def __init__(self, message: str, migration: str = "", peer: str = "", hostname: str = "") -> None:
        super().__init__(message)
        self.migration = migration
        self.peer = peer
        self.hostname = hostname


class AuthenticationError(MigrationError):
    """A peer's certificate or user was not accepted, or a record was modified in transfer."""

    exit_code = 27


class PostcopyPaused(MigrationError):
    """The connection of a post-copy migration was lost before all pages had been sent.

    The workload runs at the destination and waits at the first deferred page. The paused source retains its pages until
    a recovery has sent them.
    """

    exit_code = 28


class CheckpointError(PageferryError):
    """A checkpoint failed. The workload keeps running, and no partial image is left."""

    exit_code = 30


class ImageError(PageferryError):
    """An image is missing, damaged, incomplete or of an unsupported version."""

    exit_code = 31


class WrongKey(ImageError):
    """The key of an encrypted image is missing, does not open the image, or does not prove which user has encrypted it;
    or a key is given for an image that is not encrypted. Nothing was written."""

    exit_code = 35


class RestoreError(PageferryError):
    """A workload cannot be restored, or waits for contents that cannot be read."""

    exit_code = 32


class DisksDiffer(RestoreError):
    """The disks of a guest are not as they were at the checkpoint, or this cannot be determined. Nothing was
    restored."""

    exit_code = 33


class StoreError(PageferryError):
    """An object store cannot be reached, rejects a request, or contains another object than expected. Objects that an
    image needs are not changed."""

    exit_code = 34


class FleetError(PageferryError):
    """The cluster of a fleet or the agent of a host cannot be reached, or refuses a request. Workloads are not
    affected."""

    exit_code = 40


class FleetIncomplete(FleetError):
    """A plan has ended, and some of its workloads are not where it puts them. Every workload has one owner; the message
    names the workloads and the causes."""

    exit_code = 41


class ActorLost(FleetError):
    """A movable actor of a fleet has exited without a successor. The call may have been executed or not."""

    exit_code = 42


class CallTimeout(FleetError):
    """A call of a movable actor of a fleet has no result in time. It may be executed or not."""

    exit_code = 43
