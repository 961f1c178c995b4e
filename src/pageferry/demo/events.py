"""Events and results of the built-in workload and of its migration."""

from __future__ import annotations

from pageferry.events import Event
from pageferry.migration.events import MigrationResult


class LedgerResult(Event, frozen=True, tag="ledger"):
    """Verification of the memory of the built-in workload."""

    workload: str
    intact: bool
    writes: int
    checked: int


class DemoResult(MigrationResult, frozen=True, kw_only=True, tag="demo"):
    """Result of the migration, and of the verification of the memory of the workload."""

    intact: bool
    """Whether no write was lost."""
    writes: int
    """Number of pages written before, during and after the migration."""
    checked: int
    """Number of pages compared with the records of the workload."""
