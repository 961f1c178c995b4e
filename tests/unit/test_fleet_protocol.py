"""Tests of the requests and replies of agents, of the view that is built from them, and of command lines of guests."""

from __future__ import annotations

import msgspec
import pytest

from pageferry.errors import FleetError, NoSuchWorkload, OutcomeUnknown, UsageError
from pageferry.fleet.cluster import AgentUnreachable
from pageferry.fleet.model import Host, Workload
from pageferry.fleet.options import CloneOptions, JoinOptions, parse_labels
from pageferry.fleet.protocol import (
    Describe,
    HostReport,
    OperationReport,
    RecoveryReport,
    Reply,
    decode,
    failed,
    succeeded,
)
from pageferry.fleet.view import operations_of, view_of
from pageferry.workloads.qemu import command_line


def test_reply_has_the_result() -> None:
    assert decode(succeeded(RecoveryReport(owner="source")), RecoveryReport, "a") == RecoveryReport(owner="source")


@pytest.mark.parametrize("error", [UsageError("cannot do it"), NoSuchWorkload("no web"), OutcomeUnknown("no reply")])
def test_error_of_an_agent_is_raised_with_its_class(error: Exception) -> None:
    with pytest.raises(type(error), match=rf"^a: {error}$"):
        decode(failed(error), RecoveryReport, "a")


def test_unexpected_error_of_an_agent_is_a_failure_of_the_fleet() -> None:
    with pytest.raises(FleetError, match=r"^a: KeyError: 'x'$"):
        decode(failed(KeyError("x")), RecoveryReport, "a")


def test_class_of_an_error_that_is_not_an_error_is_not_used() -> None:
    reply = msgspec.json.encode({"failure": {"error": "printable", "message": "text"}})
    with pytest.raises(FleetError, match=r"^a: text$"):
        decode(reply, RecoveryReport, "a")


@pytest.mark.parametrize("reply", [b"", b"{}", b"[]", msgspec.json.encode(Reply()), b'{"result": {"owner": "both"}}'])
def test_invalid_reply_is_refused(reply: bytes) -> None:
    with pytest.raises(FleetError, match=r"^cannot use the reply of a: "):
        decode(reply, RecoveryReport, "a")


def test_requests_ignore_unknown_fields_of_other_versions() -> None:
    assert msgspec.json.decode(b'{"do": "describe", "later": 1}', type=Describe) == Describe()


def _report(name: str, *workloads: Workload, operations: tuple[OperationReport, ...] = ()) -> HostReport:
    return HostReport(host=Host(name=name, memory=1), address="", workloads=workloads, operations=operations)


def _workload(name: str, host: str, status: str = "running") -> Workload:
    return Workload(name=name, host=host, memory=1, private=1, status=status)  # type: ignore[arg-type]


def test_view_contains_each_workload_once_at_its_owner() -> None:
    source = _report("a", _workload("web", "a", "unknown"), _workload("other", "a"))
    view = view_of({"a": source, "b": _report("b", _workload("web", "b"))})
    assert {one.name: one.host for one in view.workloads} == {"web": "b", "other": "a"}


def test_view_contains_silent_and_draining_hosts() -> None:
    view = view_of({"a": _report("a"), "b": AgentUnreachable("no reply")}, draining=["a"])
    assert [(host.name, host.draining, host.reachable) for host in view.hosts] == [
        ("a", True, True),
        ("b", False, False),
    ]


def test_operations_of_the_view_are_those_that_run_at_the_source() -> None:
    running = OperationReport(id="1-out", kind="migrate", workload="web", peer="b", state="running")
    others = (
        OperationReport(id="1-in", kind="receive", workload="db", peer="c", state="running"),
        OperationReport(id="2", kind="checkpoint", workload="web", state="ended"),
    )
    (found,) = operations_of(_report("a", operations=(running, *others)))
    assert (found.verb, found.workload, found.host, found.destination) == ("move", "web", "a", "b")


@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("console", [None, "/run/web/tty.sock"])
@pytest.mark.parametrize("own_memory", [False, True])
def test_command_line_of_a_user_is_found_in_that_of_the_process(
    incoming: bool, console: str | None, own_memory: bool
) -> None:
    words = ["qemu-system-x86_64", "-m", "64M", "-name", "web"]
    if own_memory:
        words += ["-object", "memory-backend-file,id=r,size=64M,share=on,align=2M,mem-path=/m"]
        words += ["-machine", "memory-backend=r"]
    started = command_line.parse(words).managed(
        ram_path="/proc/self/fd/3", qmp_socket="/run/web/qmp.sock", incoming=incoming, console=console
    )
    assert started != words
    assert command_line.given_by_user(started) == words


def test_command_line_of_another_program_is_not_used() -> None:
    assert command_line.given_by_user(["qemu-system-x86_64", "-m", "64M"]) is None


def test_labels_are_parsed() -> None:
    assert parse_labels(["rack=r7", "zone=a=b"]) == {"rack": "r7", "zone": "a=b"}


@pytest.mark.parametrize("text", ["rack", "=r7", ""])
def test_invalid_labels_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected KEY=VALUE"):
        JoinOptions(labels=(text,)) if text else parse_labels([text])
    with pytest.raises(UsageError):
        CloneOptions(labels=(text,))
