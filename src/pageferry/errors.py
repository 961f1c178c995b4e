"""Errors of pageferry and the exit codes of the commands that end in them.

::

    PageferryError (1)
    ├── UsageError (2)              a value or a combination of values is invalid; also a ValueError
    │   └── WrongType (2)           a value is of the wrong type; also a TypeError
    ├── UnsupportedError (3)        this kernel, user or QEMU cannot do what was asked
    ├── WorkloadError (10)          a workload cannot be managed, or did not do what it was told
    │   ├── NoSuchWorkload (11)     no workload of that name is registered here
    │   ├── NameInUse (12)          a workload of that name is registered already
    │   └── WorkloadDied (13)       the workload ended while it was being worked on
    ├── CheckpointError (30)        a checkpoint was not written; the workload runs on
    ├── ImageError (31)             an image cannot be used: damaged, unfinished, of another version, or not there
    ├── RestoreError (32)           a workload could not be restored, or waits for contents that cannot be read
    └── MigrationError (20)         the migration ended; the workload runs on at the source
        ├── PeerRefused (21)        the peer answered, and said no
        ├── ProtocolError (22)      the peer sent what the protocol does not allow
        ├── ConnectionLost (23)     the link or the peer went away before commit
        ├── NotConverging (24)      the workload dirties memory faster than the link takes it
        ├── Cancelled (25)          somebody asked for the migration to stop
        ├── OutcomeUnknown (26)     after commit without an answer: the source stays paused
        ├── AuthenticationError (27) one side does not believe the other's certificate (--tls)
        └── PostcopyPaused (28)     it runs at the destination, and waits there for pages that are still at the source

Every message says what happened, to what, and what to do about it. Where the outcome is unknown the class says so:
only `OutcomeUnknown` leaves a workload that does not run.

The class says which part failed, not which operation: the caller's values, the host, the workload, the peer or the
link, an image. So `migrate` raises MigrationError for what the peer and the link do, and WorkloadError for what the
workload does; so do `checkpoint` and `restore`. `except PageferryError` catches all that an operation raises on
purpose. Values are checked before anything happens: after UsageError nothing has changed.
"""

from pageferry.printable import printable


class PageferryError(Exception):
    """Base of all errors that pageferry raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        """The message, without characters that a terminal would interpret: a part of it may come from a peer."""
        return printable(super().__str__())


class UsageError(PageferryError, ValueError):
    """An argument is invalid, alone or together with another one. Nothing has changed."""

    exit_code = 2


class WrongType(UsageError, TypeError):
    """An argument of the wrong type, or one that does not exist."""


class UnsupportedError(PageferryError):
    """This kernel, user or QEMU cannot do what was asked; the message says what is missing."""

    exit_code = 3


class WorkloadError(PageferryError):
    """A workload cannot be managed, or did not do what it was told.

    `never_ran`: it was to be resumed on this host, and is known not to have run for an instant.
    """

    exit_code = 10
    never_ran = False


class NoSuchWorkload(WorkloadError, LookupError):
    """No workload of that name is registered on this host."""

    exit_code = 11


class NameInUse(WorkloadError):
    """A living workload of that name is registered already."""

    exit_code = 12


class WorkloadDied(WorkloadError):
    """The workload ended while it was being worked on."""

    exit_code = 13

    def __init__(self, message: str, *, never_ran: bool = False) -> None:
        super().__init__(message)
        self.never_ran = never_ran


class MigrationError(PageferryError):
    """A migration ended without moving the workload, which runs on at the source."""

    exit_code = 20


class PeerRefused(MigrationError):
    """The peer understood the request and said no; the message is the peer's reason."""

    exit_code = 21


class ProtocolError(MigrationError):
    """The peer sent bytes or messages that the protocol does not allow here."""

    exit_code = 22


class ConnectionLost(MigrationError, ConnectionError):
    """The link or the peer went away before commit."""

    exit_code = 23


class NotConverging(MigrationError):
    """Memory is dirtied faster than the link takes it, and no round brought the rest down."""

    exit_code = 24


class Cancelled(MigrationError):
    """The migration was cancelled before commit."""

    exit_code = 25


class OutcomeUnknown(MigrationError):
    """Commit was sent and no answer came: the source stays paused until the peer has been asked.

    `migration` and `peer` (HOST:PORT) say what to ask, and whom: `pageferry.recover` does. `hostname`: the name that
    the peer's certificate must have, if it must have one.
    """

    exit_code = 26

    def __init__(self, message: str, migration: str = "", peer: str = "", hostname: str = "") -> None:
        super().__init__(message)
        self.migration = migration
        self.peer = peer
        self.hostname = hostname


class AuthenticationError(MigrationError):
    """One side does not accept the other's certificate, or what came is not from whom it should be."""

    exit_code = 27


class PostcopyPaused(MigrationError):
    """The link went after a workload had begun to run at the destination, and before all of its pages were there.

    It waits there at the first page that is missing. Here it stays paused, with all its pages, until a recovery has
    sent them.
    """

    exit_code = 28


class CheckpointError(PageferryError):
    """A checkpoint was not written. The workload runs on, and there is no half image."""

    exit_code = 30


class ImageError(PageferryError):
    """An image cannot be used: damaged, unfinished, of another version, or not there."""

    exit_code = 31


class RestoreError(PageferryError):
    """A workload could not be restored, or waits for contents that cannot be read."""

    exit_code = 32
