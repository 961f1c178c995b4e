"""Sinks that receive the events of a verb in addition to stdout: event log, progress record and Prometheus metrics."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pageferry.report.event_log import EventLog


def open_sinks(args: argparse.Namespace, stack: ExitStack) -> EventLog | None:
    """Open the requested sinks until the stack is closed. Return the event log, or None; the caller must end the log.

    Raises UsageError if the log or the address of the metrics is invalid, or UnsupportedError without the Prometheus
    client.
    """
    log = _open_log(args, stack) if args.log is not None else None
    if getattr(args, "metrics", None) is not None:
        _open_metrics(args, stack)
    names = _workloads(args)
    if names:
        _open_progress(args, names, stack)
    return log


def _open_log(args: argparse.Namespace, stack: ExitStack) -> EventLog:
    from pageferry.report.event_log import EventLog, header
    from pageferry.report.reporter import add_sink

    log = EventLog(args.log, header(args.verb, vars(args)))
    stack.enter_context(add_sink(log))
    return log


def _open_metrics(args: argparse.Namespace, stack: ExitStack) -> None:
    from pageferry.report.metrics import Metrics, MetricsServer, address
    from pageferry.report.reporter import add_sink

    host, port = address(args.metrics, insecure=args.metrics_insecure)
    metrics = Metrics(args.verb, ", ".join(_subjects(args)))
    server = MetricsServer(metrics, host, port)
    stack.callback(server.close)
    stack.enter_context(add_sink(metrics))


def _open_progress(args: argparse.Namespace, names: list[str], stack: ExitStack) -> None:
    from pageferry.report.progress import Progress
    from pageferry.report.reporter import add_sink

    stack.enter_context(add_sink(stack.enter_context(Progress(args.verb, names))))


def _workloads(args: argparse.Namespace) -> list[str]:
    return [name for name in _subjects(args) if ":" not in name and "/" not in name]


def _subjects(args: argparse.Namespace) -> list[str]:
    """Return the workloads of the verb: the value of the argument whose name is in `WORKS_ON` of the verb's module."""
    value = getattr(args, args.works_on) if getattr(args, "works_on", None) else []
    if value is None:  # a VM that is selected by the socket of its monitor
        return []
    return [value] if isinstance(value, str) else list(value)
