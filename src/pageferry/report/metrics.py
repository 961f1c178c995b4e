"""Prometheus metrics of a running command (`--metrics HOST:PORT`).

The values are taken from the events of the command. `METRICS` lists all metrics; the Metrics page of the documentation
is generated from this list.
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
    """Metric and the source of its value."""

    name: str
    """Name without the suffix `_total` of counters."""
    kind: Literal["gauge", "counter"]
    help: str
    events: tuple[str, ...]
    """Types of the events that contain the value."""
    field: str
    """Path of the field in the event. Dots separate the names of nested fields."""
    factor: float = 1.0
    adds: bool = False
    """Whether an event contains an increment instead of the total."""


_MIGRATED = ("migration", "demo")

METRICS = (
    Metric("pageferry_migration_rounds", "gauge", "Completed rounds.", ("round",), "round"),
    Metric("pageferry_migration_sent_bytes", "counter", "Bytes sent in rounds.", ("round",), "sent", adds=True),
    Metric(
        "pageferry_migration_remaining_bytes", "gauge", "Bytes modified during the last round.", ("round",), "remaining"
    ),
    Metric(
        "pageferry_migration_dirty_bytes_per_second",
        "gauge",
        "Dirty rate of the workload in the last round.",
        ("round",),
        "dirty_rate",
    ),
    Metric(
        "pageferry_migration_bytes_per_second",
        "gauge",
        "Send rate on the wire.",
        ("progress", "round"),
        "mbps",
        1e6 / 8,
    ),
    Metric(
        "pageferry_migration_disks_copied_bytes",
        "counter",
        "Bytes of disks copied.",
        ("disk-progress",),
        "done",
    ),
    Metric(
        "pageferry_migration_disks_remaining_bytes",
        "gauge",
        "Bytes of disks left to copy.",
        ("disk-progress",),
        "remaining",
    ),
    Metric(
        "pageferry_migration_postcopy_remaining_bytes",
        "gauge",
        "Deferred bytes at the destination.",
        ("postcopy",),
        "remaining",
    ),
    Metric(
        "pageferry_migration_postcopy_requests",
        "counter",
        "Page requests of the destination.",
        ("postcopy",),
        "postcopy_requests",
    ),
    Metric(
        "pageferry_migration_downtime_seconds",
        "gauge",
        "Downtime, set when the migration has completed.",
        _MIGRATED,
        "downtime",
        1e-3,
    ),
    Metric("pageferry_checkpoint_saved_bytes", "gauge", "Memory saved so far.", ("checkpoint-progress",), "done", 4096),
    Metric(
        "pageferry_checkpoint_present_bytes",
        "gauge",
        "Memory that the checkpoint saves.",
        ("checkpoint-progress",),
        "total",
        4096,
    ),
    Metric(
        "pageferry_checkpoint_stored_bytes",
        "gauge",
        "Bytes written to the image so far.",
        ("checkpoint-progress",),
        "stored",
    ),
    Metric(
        "pageferry_checkpoint_traps",
        "counter",
        "Writes of the workload that waited for a copy.",
        ("checkpoint-progress",),
        "traps",
    ),
    Metric(
        "pageferry_checkpoint_downtime_seconds",
        "gauge",
        "Time for which the workload was paused.",
        ("snapshot-point", "checkpoint"),
        "downtime",
        1e-3,
    ),
    Metric(
        "pageferry_restore_deferred_bytes",
        "gauge",
        "Bytes not loaded from the image yet.",
        ("running", "restore-progress", "restore"),
        "deferred",
    ),
    Metric(
        "pageferry_restore_faults",
        "counter",
        "Page faults served by the pager.",
        ("restore-progress", "restore"),
        "faults",
    ),
    Metric(
        "pageferry_restore_missed_faults",
        "counter",
        "Page faults on deferred pages.",
        ("restore-progress", "restore"),
        "missed",
    ),
    Metric(
        "pageferry_restore_read_bytes",
        "counter",
        "Bytes read from the image.",
        ("restore-progress", "restore"),
        "bytes_read",
    ),
    Metric(
        "pageferry_restore_fault_p99_seconds",
        "gauge",
        "99th percentile of the service time of faults.",
        ("restore",),
        "service_times.p99_us",
        1e-6,
    ),
    Metric(
        "pageferry_large_pages_mapped", "gauge", "Huge pages of the target.", ("large-pages",), "estimate.large_pages"
    ),
    Metric(
        "pageferry_large_pages_idle_bytes",
        "gauge",
        "Estimated bytes in base pages of huge pages that were not accessed in the window.",
        ("large-pages",),
        "estimate.idle",
    ),
    Metric(
        "pageferry_large_pages_reclaimed_bytes",
        "counter",
        "Bytes moved to swap or to a store.",
        ("large-pages",),
        "reclaimed",
        adds=True,
    ),
    Metric(
        "pageferry_large_pages_sampled",
        "counter",
        "Huge pages sampled.",
        ("large-pages",),
        "estimate.sampled",
        adds=True,
    ),
    Metric(
        "pageferry_large_pages_cpu_ratio",
        "gauge",
        "CPU use of sampling, as a fraction of one CPU.",
        ("large-pages",),
        "overhead.fraction",
    ),
    Metric(
        "pageferry_sharing_reclaimable_bytes",
        "gauge",
        "Bytes that merging all duplicate pages would free.",
        ("sharing",),
        "reclaimable",
    ),
    Metric(
        "pageferry_sharing_possible_bytes",
        "gauge",
        "Reclaimable bytes that merging can free on this host.",
        ("sharing",),
        "possible",
    ),
    Metric("pageferry_sharing_freed_bytes", "counter", "Bytes freed by sharing.", ("sharing",), "freed", adds=True),
)
EVENTS = "pageferry_events"
"""Name of the counter of events; its label `type` is the type of the event."""
INFO = "pageferry_command_info"
"""Name of the metric that describes the command: its value is 1, and its labels are `version`, `verb` and `subject`."""


class Metrics:
    """Sink that records the values of events, and collector from which the Prometheus client obtains them."""

    def __init__(self, verb: str, subject: str) -> None:
        from importlib.metadata import version

        self.labels = {"version": version("pageferry"), "verb": verb, "subject": subject}
        self.values: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def event(self, event: Event) -> None:
        """Update the values from an event."""
        tag = str(event.__struct_config__.tag)
        with self._lock:
            self.counts[tag] += 1
            for metric in METRICS:
                if tag in metric.events and (value := _field(event, metric.field)) is not None:
                    before = self.values.get(metric.name, 0.0) if metric.adds else 0.0
                    self.values[metric.name] = before + value * metric.factor

    def collect(self) -> Iterator[Family]:
        """Yield all metrics that have a value."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        info = GaugeMetricFamily(INFO, "Running command.", labels=list(self.labels))
        info.add_metric(list(self.labels.values()), 1)
        yield info
        with self._lock:
            values, counts = dict(self.values), dict(self.counts)
        events = CounterMetricFamily(EVENTS, "Events emitted by the command.", labels=["type"])
        for tag, count in counts.items():
            events.add_metric([tag], count)
        yield events
        for metric in METRICS:
            if metric.name in values:
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                yield kind(metric.name, metric.help, value=values[metric.name])


class MetricsServer:
    """HTTP server from which Prometheus scrapes the metrics. It runs in a separate thread until `close` is called."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Start the server. Raises UnsupportedError if the client library is not installed, UsageError if the server
        cannot listen on the address."""
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as missing:
            raise UnsupportedError(
                "--metrics requires the Python package prometheus-client: pip install 'pageferry[metrics]'"
            ) from missing
        registry = CollectorRegistry()
        registry.register(metrics)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise UsageError(
                f"cannot serve metrics on {host}:{port}: {error.strerror or error}; give another address with --metrics"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        log.info("serving metrics at %s", self.url)

    def close(self) -> None:
        """Stop the server and wait for its thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def address(text: str, *, insecure: bool) -> tuple[str, int]:
    """Parse HOST:PORT, where HOST is an IP address, `localhost` or empty (loopback). Raises UsageError if the text is
    invalid, or if the address is not loopback and `insecure` is false."""
    host, separator, port = text.rpartition(":")
    try:
        found = ipaddress.ip_address("127.0.0.1" if host in ("", "localhost") else host.strip("[]"))
    except ValueError:
        separator = ""
    if not separator or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"invalid --metrics {text!r}: expected an IP address and a port, such as 127.0.0.1:9400")
    if not found.is_loopback and not insecure:
        raise UsageError(
            f"--metrics {text}: refusing to serve metrics unencrypted; use a loopback address, or "
            f"--metrics-insecure on a trusted network"
        )
    return str(found), int(port)


def _field(event: Event, path: str) -> float | None:
    value: Any = event
    for name in path.split("."):
        value = getattr(value, name, None)
    return None if value is None else float(value)
