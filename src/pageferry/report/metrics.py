"""Metrics of a command while it runs, for Prometheus to scrape (`--metrics HOST:PORT`).

Values come from the events that the command tells. `METRICS` is the list of all; docs/metrics.md is made of it.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from logging import getLogger
from typing import TYPE_CHECKING, Any, Literal

from pageferry.errors import UnsupportedError, UsageError
from pageferry.events import Event

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

log = getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, and where its value comes from."""

    name: str
    """Without the `_total` that counters have in addition."""
    kind: Literal["gauge", "counter"]
    help: str
    events: tuple[str, ...]
    """Types of the events (docs/events.md) that tell it."""
    field: str
    """Of the event; dots lead into parts of it."""
    factor: float = 1.0
    adds: bool = False
    """Each event tells what has come to it, not all there is."""


_MIGRATED = ("migration", "demo")

METRICS = (
    Metric("pageferry_migration_rounds", "gauge", "Rounds of copying that are done.", ("round",), "round"),
    Metric("pageferry_migration_sent_bytes", "counter", "Sent in rounds.", ("round",), "sent", adds=True),
    Metric("pageferry_migration_remaining_bytes", "gauge", "Modified in the last round.", ("round",), "remaining"),
    Metric(
        "pageferry_migration_dirty_bytes_per_second",
        "gauge",
        "Memory that the workload modified per second in the last round.",
        ("round",),
        "dirty_rate",
    ),
    Metric(
        "pageferry_migration_bytes_per_second", "gauge", "Speed on the wire.", ("progress", "round"), "mbps", 1e6 / 8
    ),
    Metric("pageferry_migration_postcopy_remaining_bytes", "gauge", "Still to come.", ("postcopy",), "remaining"),
    Metric("pageferry_migration_postcopy_requests", "counter", "Asked for.", ("postcopy",), "postcopy_requests"),
    Metric("pageferry_migration_downtime_seconds", "gauge", "Told at its end.", _MIGRATED, "downtime", 1e-3),
    Metric("pageferry_checkpoint_saved_bytes", "gauge", "Memory saved so far.", ("saving",), "done", 4096),
    Metric("pageferry_checkpoint_present_bytes", "gauge", "Memory that is to be saved.", ("saving",), "total", 4096),
    Metric("pageferry_checkpoint_stored_bytes", "gauge", "Written to the image so far.", ("saving",), "stored"),
    Metric("pageferry_checkpoint_traps", "counter", "Writes of the workload that waited.", ("saving",), "traps"),
    Metric(
        "pageferry_checkpoint_downtime_seconds",
        "gauge",
        "For which the workload was paused.",
        ("instant", "checkpoint"),
        "downtime",
        1e-3,
    ),
    Metric(
        "pageferry_restore_deferred_bytes",
        "gauge",
        "Contents still to come.",
        ("running", "restore-progress", "restore"),
        "deferred",
    ),
    Metric(
        "pageferry_restore_faults",
        "counter",
        "Accesses that waited for the pager.",
        ("restore-progress", "restore"),
        "faults",
    ),
    Metric(
        "pageferry_restore_missed_faults",
        "counter",
        "Of these, to pages whose contents were still to come.",
        ("restore-progress", "restore"),
        "missed",
    ),
    Metric(
        "pageferry_restore_read_bytes",
        "counter",
        "Read from the image.",
        ("restore-progress", "restore"),
        "bytes_read",
    ),
    Metric(
        "pageferry_restore_fault_p99_seconds",
        "gauge",
        "Within which 99 of 100 faults were served.",
        ("restore",),
        "service_times.p99_us",
        1e-6,
    ),
    Metric(
        "pageferry_large_pages_mapped", "gauge", "Large pages of the target.", ("large-pages",), "estimate.large_pages"
    ),
    Metric(
        "pageferry_large_pages_idle_bytes",
        "gauge",
        "Estimate of what of them was not accessed in the window.",
        ("large-pages",),
        "estimate.idle",
    ),
    Metric(
        "pageferry_large_pages_reclaimed_bytes",
        "counter",
        "Sent to swap, or to a store.",
        ("large-pages",),
        "reclaimed",
        adds=True,
    ),
    Metric("pageferry_large_pages_sampled", "counter", "Looked at.", ("large-pages",), "estimate.sampled", adds=True),
    Metric(
        "pageferry_large_pages_cpu_ratio", "gauge", "Of one CPU, for looking.", ("large-pages",), "overhead.fraction"
    ),
    Metric(
        "pageferry_sharing_reclaimable_bytes",
        "gauge",
        "What sharing equal pages would free if all could be shared.",
        ("sharing",),
        "reclaimable",
    ),
    Metric("pageferry_sharing_possible_bytes", "gauge", "Of that, what can be had here.", ("sharing",), "possible"),
    Metric("pageferry_sharing_freed_bytes", "counter", "Freed by sharing.", ("sharing",), "freed", adds=True),
)
EVENTS = "pageferry_events"
"""Counter of events, labelled by their `type`."""
INFO = "pageferry_command_info"
"""Always 1; its labels say what runs: `version`, `verb`, `subject`."""


class Metrics:
    """A sink of events that keeps the values, and gives them to the Prometheus client as a collector."""

    def __init__(self, verb: str, subject: str) -> None:
        from importlib.metadata import version

        self.labels = {"version": version("pageferry"), "verb": verb, "subject": subject}
        self.values: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def event(self, event: Event) -> None:
        """Take in what was told."""
        tag = str(event.__struct_config__.tag)
        with self._lock:
            self.counts[tag] += 1
            for metric in METRICS:
                if tag in metric.events and (value := _field(event, metric.field)) is not None:
                    before = self.values.get(metric.name, 0.0) if metric.adds else 0.0
                    self.values[metric.name] = before + value * metric.factor

    def collect(self) -> Iterator[Family]:
        """What Prometheus is told."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        info = GaugeMetricFamily(INFO, "What runs.", labels=list(self.labels))
        info.add_metric(list(self.labels.values()), 1)
        yield info
        with self._lock:
            values, counts = dict(self.values), dict(self.counts)
        told = CounterMetricFamily(EVENTS, "Events that the command has told.", labels=["type"])
        for tag, count in counts.items():
            told.add_metric([tag], count)
        yield told
        for metric in METRICS:
            if metric.name in values:
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                yield kind(metric.name, metric.help, value=values[metric.name])


class MetricsServer:
    """Answers scrapes on a thread of its own until it is closed."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Raises UnsupportedError without the client library, UsageError where the address cannot be had."""
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as missing:
            raise UnsupportedError(
                "--metrics needs the Python package prometheus-client: pip install 'pageferry[metrics]'"
            ) from missing
        registry = CollectorRegistry()
        registry.register(metrics)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise UsageError(f"--metrics {host}:{port}: {error.strerror or error}") from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        log.info("metrics at %s", self.url)

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def address(text: str, *, insecure: bool) -> tuple[str, int]:
    """Where to listen, from HOST:PORT with an IP address. Raises UsageError, for other than loopback too."""
    host, separator, port = text.rpartition(":")
    try:
        found = ipaddress.ip_address("127.0.0.1" if host in ("", "localhost") else host.strip("[]"))
    except ValueError:
        separator = ""
    if not separator or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--metrics {text}: give an IP address and a port, for example 127.0.0.1:9400")
    if not found.is_loopback and not insecure:
        raise UsageError(
            f"--metrics {text}: anybody who reaches it could read what runs here; use a loopback address, or "
            f"--metrics-insecure where the network is yours alone"
        )
    return str(found), int(port)


def _field(event: Event, path: str) -> float | None:
    value: Any = event
    for name in path.split("."):
        value = getattr(value, name, None)
    return None if value is None else float(value)
