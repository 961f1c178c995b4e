"""Ownership of the workload: what each side persists before it takes a step that cannot be undone.

1. The source records that it has committed before it sends Commit. From then on it never runs the workload on its own.
2. The destination decides once: COMMITTED before it resumes the workload, ABORTED before it reports that it will not
   resume it. The decision that is written first holds, regardless of the process that writes it
   (`CommitDecisions.decide`). COMMITTED is withdrawn in one case: the process that was to run the workload exited
   before the request to do so.
3. In post-copy, the source keeps every page until the destination has recorded that it has all of them, and has
   reported this.

So at most one side can run the workload at any time, and a surviving side can determine which: see `docs/protocol.md`.
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
from pageferry.migration.transport.messages import Codec
from pageferry.workloads.protocols import OwnershipRecord

RECORD = "migration.json"
"""File name of the source's record, in the directory of the workload."""


VERSION = 2
"""Version of the record. Version 1 had neither `version` nor `changes`."""


class Committed(msgspec.Struct, frozen=True, kw_only=True):
    """Record that the source has committed a workload. The outcome may be unknown."""

    version: int = 1
    migration: str
    """Identifier of the migration, 32 hexadecimal digits."""
    peer: str
    """Address of the destination."""
    hostname: str = ""
    """Host name expected in the certificate of the destination, with TLS."""
    keeps_pages: bool = msgspec.field(name="owes", default=False)
    """Whether the source holds pages that the destination lacks; the source must not discard them before the
    destination has reported that it has all of them."""
    streams: int = 1
    codec: Codec = "none"
    bandwidth: int = 0
    adaptive: bool = False
    """`streams`, `codec`, `bandwidth` and `adaptive` are the options of the migration; they apply to the missing pages
    too."""
    changes: dict[str, Any] = {}
    """Changes to undo before the workload runs at the source again: see `workloads.protocols.Migratable`. Empty if
    unknown."""


def committed(folder: Folder | None) -> Committed | None:
    """Return the record in the directory of a workload, or None if there is none. Raises WorkloadError."""
    record = folder.load(RECORD, Committed) if folder is not None else None
    if record is not None and record.version > VERSION:
        raise WorkloadError(
            f"cannot read {RECORD}: unsupported version {record.version}, this pageferry supports up to {VERSION}; use "
            "a newer pageferry"
        )
    return record


class CommitDecision(Enum):
    """Decision of the destination about a migration."""

    COMMITTED = "committed"
    """The destination owns the workload."""
    ABORTED = "aborted"
    """The destination has renounced the workload: the source owns it."""


KEPT = 30 * 24 * 3600.0
"""Seconds for which the records of a migration are retained if the source has not acknowledged the decision. A source
that sends Recover later receives `unknown`, which is always safe."""


class CommitDecisions:
    """Decisions of this host as a destination. Each is stored in a small file that outlives the process that made the
    decision."""

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / ".verdicts"

    def begin(self, migration: str) -> None:
        """Record that this host takes part in a migration, before anything else is stored about it.

        Create the files of all later records now, under other names, so that no later record needs space. After Commit,
        a full file system must not cause a failure.

        Raises UsageError if this host knows the identifier: the earlier decision must hold, and must not be deleted
        with this migration. Raises WorkloadError if the records cannot be written.
        """
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.check_private(self._path, "remove it")
            self._prune()
            self._begin(migration)
        except OSError as error:
            raise WorkloadError(f"cannot write decisions of migrations to {self._path}: {error}") from error

    def _begin(self, migration: str) -> None:
        try:
            os.close(files.open_private(self._begun(migration), os.O_WRONLY | os.O_EXCL))
        except FileExistsError as known:
            raise UsageError(f"cannot begin migration {migration}: this host has already used the id; retry") from known
        try:
            for decision in CommitDecision:
                files.replace_file(self._prepared(migration, decision), decision.value.encode(), synced=True)
            for spare in (self._spare(migration), self._arriving(migration)):
                files.replace_file(spare, b"", synced=True)
        except OSError:
            self.forget(migration)
            raise

    def knows(self, migration: str) -> bool:
        """Return whether `begin` was called for this migration."""
        return self._begun(migration).exists()

    def decide(self, migration: str, decision: CommitDecision) -> CommitDecision:
        """Record `decision`, unless a decision exists. Return the decision that holds; it is durable.

        Raises WorkloadError if the decision cannot be written; in that case, nothing has been decided.
        """
        target, prepared = self._decision(migration), self._prepared(migration, decision)
        try:
            if target.exists():
                return CommitDecision(target.read_text(encoding="ascii"))
            if not prepared.exists():  # begun by an earlier version of pageferry
                files.replace_file(prepared, decision.value.encode(), synced=True)
            self._spare(migration).unlink(missing_ok=True)  # frees an inode: tmpfs counts a hard link as a file
            try:
                # link(2) fails if the name exists, so the first decision holds.
                os.link(prepared, target)
            except FileExistsError:
                return CommitDecision(target.read_text(encoding="ascii"))
            self._sync()
        except OSError as error:
            raise WorkloadError(f"cannot write the decision of the migration to {target}: {error}") from error
        return decision

    def withdraw(self, migration: str) -> None:
        """Change COMMITTED to ABORTED, for a workload that was never run and whose process has exited.

        Only the process that decided may call this, before it has reported the decision. Raises WorkloadError if
        ABORTED cannot be written; COMMITTED then holds.
        """
        target = self._decision(migration)
        try:
            self._publish(self._prepared(migration, CommitDecision.ABORTED), target, CommitDecision.ABORTED.value)
        except OSError as error:
            raise WorkloadError(f"cannot withdraw the decision of the migration in {target}: {error}") from error

    def arrive(self, migration: str) -> None:
        """Record durably that every missing page has been received.

        Raises WorkloadError if the record cannot be written; the source then keeps the pages.
        """
        try:
            self._publish(self._arriving(migration), self._arrived(migration), "")
        except OSError as error:
            raise WorkloadError(f"cannot record in {self._path} that all pages have been received: {error}") from error

    def arrived(self, migration: str) -> bool:
        """Return whether `arrive` was called for this migration."""
        return self._arrived(migration).exists()

    def witness(self, migration: str) -> OwnershipRecord:
        """Return the file and contents that prove the decision COMMITTED."""
        return OwnershipRecord(self._decision(migration), CommitDecision.COMMITTED.value)

    def forget(self, migration: str) -> None:
        """Delete all records of a migration whose source knows the decision and will not send Recover."""
        # The `begun` file is deleted first: a migration without it is unknown, whereas a migration that has begun but
        # has no decision could be decided again.
        self._begun(migration).unlink(missing_ok=True)
        self._decision(migration).unlink(missing_ok=True)
        self._arrived(migration).unlink(missing_ok=True)
        prepared = [self._prepared(migration, decision) for decision in CommitDecision]
        for file in (*prepared, self._spare(migration), self._arriving(migration)):
            file.unlink(missing_ok=True)

    def _publish(self, prepared: Path, target: Path, contents: str) -> None:
        """Rename a prepared file to `target`, which needs no space on the file system. The record is durable on
        return."""
        try:
            prepared.rename(target)
        except FileNotFoundError:  # begun by an earlier version of pageferry
            files.replace_file(target, contents.encode(), synced=True)
        self._sync()

    def _prune(self) -> None:
        oldest = time.time() - KEPT
        for file in self._path.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                if file.stat().st_mtime < oldest:
                    self.forget(file.stem)

    def _decision(self, migration: str) -> Path:
        return self._path / f"{migration}.verdict"

    def _begun(self, migration: str) -> Path:
        return self._path / f"{migration}.begun"

    def _arrived(self, migration: str) -> Path:
        return self._path / f"{migration}.arrived"

    def _prepared(self, migration: str, decision: CommitDecision) -> Path:
        return self._path / f"{migration}.{decision.value}"

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
