"""Tests of the errors that the engine raises in a migration."""

from __future__ import annotations

import pytest

from pageferry._engine import TlsError
from pageferry.errors import AuthenticationError, Cancelled, ConnectionLost, PageferryError, WorkloadDied, WorkloadError
from pageferry.migration.engine_call import translate


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TlsError("the certificate has expired"), AuthenticationError),
        (PermissionError("cannot handle page faults of process 7: userfaultfd: not permitted"), WorkloadError),
        (PermissionError(1, "Operation not permitted"), WorkloadError),
        (ProcessLookupError("process 7 has exited"), WorkloadDied),
        (ConnectionResetError(104, "Connection reset by peer"), ConnectionLost),
        (InterruptedError("cancelled"), Cancelled),
    ],
)
def test_error_of_the_engine_becomes_that_of_its_cause(error: OSError, expected: type[PageferryError]) -> None:
    assert type(translate(error)) is expected
