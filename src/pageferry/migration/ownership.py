"""Who owns the workload: what each side writes down, durably, before it does what cannot be undone.

1. The source records that it has committed before it sends Commit. From then on it never runs the workload of its own
   accord.
2. The destination decides once, for good: COMMITTED before it resumes the workload, ABORTED before it tells anybody
   that it will not. Whichever is written first holds, whoever of its processes writes it (`Verdicts.decide`).
   COMMITTED is withdrawn in one case: the workload's process has died, and nobody had told it to run yet.

3. In post-copy the source keeps every page until the destination has written down that all have arrived, and says so.

So at any instant at most one side may run it, and whoever is left over can find out which: see `docs/protocol.md`.
"""

from __future__ import annotations

import contextlib
import os
import time
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec

from pageferry.errors import UsageError, WorkloadError
from pageferry.host import files
from pageferry.host.registry import Folder
from pageferry.migration.messages import Codec
from pageferry.workloads.protocols import Witness

RECORD = "migration.json"
"""File name of the source's record, in the folder of the workload."""


VERSION = 2
"""Version of the record. 1 had neither `version` nor `changes`."""


class Committed(msgspec.Struct, frozen=True, kw_only=True):
    """The source's record: this workload was given away, and the answer may still be out."""

    version: int = 1
    migration: str
    """Random name of the migration, 32 hexadecimal digits."""
    peer: str
    """HOST:PORT of the destination."""
    hostname: str = ""
    """The name that its certificate must have, under TLS."""
    owes: bool = False
    """Pages are only here: the workload may not be forgotten before the destination says that all have arrived."""
    streams: int = 1
    codec: Codec = "none"
    bandwidth: int = 0
    adaptive: bool = False
    """How they are sent: as in `Options`."""
    changes: dict[str, Any] = {}
    """How to make the workload as it was: see `workloads.protocols.Revertible`. Empty: nothing is known of it."""


def committed(folder: Folder | None) -> Committed | None:
    """The record in the folder of a workload; None if it was not given away. Raises WorkloadError."""
    record = folder.load(RECORD, Committed) if folder is not None else None
    if record is not None and record.version > VERSION:
        raise WorkloadError(
            f"unsupported version {record.version} of {RECORD}: expected up to {VERSION}; use a newer pageferry"
        )
    return record


class Verdict(Enum):
    """The destination's decision."""

    COMMITTED = "committed"
    """The workload is the destination's."""
    ABORTED = "aborted"
    """The destination has given up its claim: the workload is the source's."""


KEPT = 30 * 24 * 3600.0
"""Seconds for which the decision about a migration is kept while its source has not been heard of. A source that asks
later is told `unknown`, which is never wrong."""


class Verdicts:
    """Decisions of this host as a destination, one small file each; they outlive the processes that took them."""

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / ".verdicts"

    def begin(self, migration: str) -> None:
        """Record that this host takes part in a migration, before anything else is known of it.

        Everything that is written about it later is written here already, under other names: after Commit a full
        file system must not be what fails.

        Raises UsageError for a number that this host knows already: what was decided then must hold, and must not be
        forgotten with another migration. WorkloadError when it cannot be written.
        """
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.check_private(self._path, "remove it")
            self._prune()
            self._begin(migration)
        except OSError as error:
            raise WorkloadError(f"decisions about migrations cannot be written to {self._path}: {error}") from error

    def _begin(self, migration: str) -> None:
        try:
            os.close(files.open_private(self._begun(migration), os.O_WRONLY | os.O_EXCL))
        except FileExistsError as known:
            raise UsageError(f"the number of the migration, {migration}, was used before on this host") from known
        try:
            for verdict in Verdict:
                files.replace_file(self._prepared(migration, verdict), verdict.value.encode(), synced=True)
            for spare in (self._spare(migration), self._arriving(migration)):
                files.replace_file(spare, b"", synced=True)
        except OSError:
            self.forget(migration)
            raise

    def knows(self, migration: str) -> bool:
        """Whether `begin` was called for it here."""
        return self._begun(migration).exists()

    def decide(self, migration: str, verdict: Verdict) -> Verdict:
        """Decide, unless it has been decided already; returns what holds. Durable when this returns.

        Raises WorkloadError when it cannot be written: then nothing has been decided.
        """
        target, prepared = self._verdict(migration), self._prepared(migration, verdict)
        try:
            if target.exists():
                return Verdict(target.read_text(encoding="ascii"))
            if not prepared.exists():  # an earlier release has begun this migration
                files.replace_file(prepared, verdict.value.encode(), synced=True)
            self._spare(migration).unlink(missing_ok=True)  # tmpfs counts a second name as a file
            try:
                # A link fails where the name exists: the first one holds.
                os.link(prepared, target)
            except FileExistsError:
                return Verdict(target.read_text(encoding="ascii"))
            self._sync()
        except OSError as error:
            raise WorkloadError(f"the decision about the migration cannot be written to {target}: {error}") from error
        return verdict

    def withdraw(self, migration: str) -> None:
        """Turn a decision to run the workload into one not to: it was never run, and is not there to be run any more.

        Only for the process that decided, and before it has told anybody. Raises WorkloadError when it cannot be
        written: then the decision stands.
        """
        target = self._verdict(migration)
        try:
            self._publish(self._prepared(migration, Verdict.ABORTED), target, Verdict.ABORTED.value)
        except OSError as error:
            raise WorkloadError(f"the decision about the migration cannot be withdrawn in {target}: {error}") from error

    def arrive(self, migration: str) -> None:
        """Note that every page of a workload that was missing when it began to run is here. Durable when this returns.

        Raises WorkloadError when it cannot be written: then the source keeps them.
        """
        try:
            self._publish(self._arriving(migration), self._arrived(migration), "")
        except OSError as error:
            raise WorkloadError(f"that all pages have arrived cannot be written to {self._path}: {error}") from error

    def arrived(self, migration: str) -> bool:
        """Whether `arrive` was called for it here."""
        return self._arrived(migration).exists()

    def witness(self, migration: str) -> Witness:
        """Where it can be seen that a migration was decided for this host."""
        return Witness(self._verdict(migration), Verdict.COMMITTED.value)

    def forget(self, migration: str) -> None:
        """The source knows what was decided, and will not ask."""
        # In this order: a verdict alone would be forgotten, a beginning alone could be decided anew.
        self._begun(migration).unlink(missing_ok=True)
        self._verdict(migration).unlink(missing_ok=True)
        self._arrived(migration).unlink(missing_ok=True)
        prepared = [self._prepared(migration, verdict) for verdict in Verdict]
        for file in (*prepared, self._spare(migration), self._arriving(migration)):
            file.unlink(missing_ok=True)

    def _publish(self, prepared: Path, target: Path, contents: str) -> None:
        """Give a prepared file its name, which needs no space on the file system."""
        try:
            prepared.rename(target)
        except FileNotFoundError:  # an earlier release has begun this migration
            files.replace_file(target, contents.encode(), synced=True)
        self._sync()

    def _prune(self) -> None:
        oldest = time.time() - KEPT
        for file in self._path.iterdir():
            with contextlib.suppress(FileNotFoundError):  # somebody else was faster
                if file.stat().st_mtime < oldest:
                    self.forget(file.stem)

    def _verdict(self, migration: str) -> Path:
        return self._path / f"{migration}.verdict"

    def _begun(self, migration: str) -> Path:
        return self._path / f"{migration}.begun"

    def _arrived(self, migration: str) -> Path:
        return self._path / f"{migration}.arrived"

    def _prepared(self, migration: str, verdict: Verdict) -> Path:
        return self._path / f"{migration}.{verdict.value}"

    def _spare(self, migration: str) -> Path:
        return self._path / f"{migration}.spare"

    def _arriving(self, migration: str) -> Path:
        return self._path / f"{migration}.arriving"

    def _sync(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
