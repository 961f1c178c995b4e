"""Tests of metrics: values computed from events, text output, and completeness of the documentation."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pageferry.checkpoints.events import SavingEvent
from pageferry.cli.main import main
from pageferry.errors import UsageError
from pageferry.report.event_log import Log
from pageferry.report.metrics import METRICS, Metrics, MetricsServer, address
from scripts import events, metrics
from tests.logs import MAKERS


def scraped(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def told(path: Path) -> Metrics:
    """Return the metrics computed from all events of a log."""
    kinds, sink = events.events(), Metrics("verb", "web")
    for line in Log.read(path).lines:
        sink.event(line.to(kinds[line.tag]))
    return sink


def test_every_metric_is_set_by_its_events(tmp_path: Path) -> None:
    values: dict[str, float] = {}
    for name, make in MAKERS.items():
        make(tmp_path / name)
        values |= told(tmp_path / name).values
    missing = {metric.name for metric in METRICS} - set(values)
    assert missing == {"pageferry_sharing_freed_bytes"}, "no sharing was applied"
    assert values["pageferry_migration_sent_bytes"] == (400 + 80 + 19 + 3) << 20
    assert values["pageferry_migration_downtime_seconds"] == pytest.approx(0.0214)
    assert values["pageferry_checkpoint_saved_bytes"] == 179200 * 4096
    assert values["pageferry_restore_deferred_bytes"] == 0
    assert values["pageferry_restore_fault_p99_seconds"] == pytest.approx(1024e-6)


def test_events_and_fields_of_metrics_exist() -> None:
    kinds = events.events()
    for metric in METRICS:
        for tag in metric.events:
            assert metric.field.split(".")[0] in kinds[tag].__struct_fields__, metric.name


def test_scrape_returns_current_values() -> None:
    sink = Metrics("checkpoint", "web")
    server = MetricsServer(sink, "127.0.0.1", 0)
    try:
        assert "pageferry_checkpoint_stored_bytes" not in scraped(server.url)
        sink.event(SavingEvent(done=2, total=4, traps=7, stored=123))
        found = scraped(server.url)
        assert found["pageferry_checkpoint_stored_bytes"] == 123
        assert found["pageferry_checkpoint_saved_bytes"] == 8192
        assert found["pageferry_checkpoint_traps_total"] == 7
    finally:
        server.close()
    with pytest.raises(OSError, match="refused"):
        scraped(server.url)


@pytest.mark.parametrize(
    "text", ["9400", "web:9400", "127.0.0.1:x", "127.0.0.1:99999", "10.0.0.1:9400", "0.0.0.0:9400"]
)
def test_invalid_or_insecure_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--metrics"):
        address(text, insecure=False)


def test_valid_addresses_are_accepted() -> None:
    assert address("localhost:9400", insecure=False) == ("127.0.0.1", 9400)
    assert address("[::1]:0", insecure=False) == ("::1", 0)
    assert address("0.0.0.0:9400", insecure=True) == ("0.0.0.0", 9400)


def test_port_in_use_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    server = MetricsServer(Metrics("lister", ""), "127.0.0.1", 0)
    try:
        port = server.url.rpartition(":")[2].removesuffix("/metrics")
        assert main(["large-pages", "pid:1", "--metrics", f"127.0.0.1:{port}"]) == 2
        assert "--metrics" in capsys.readouterr().err
    finally:
        server.close()


def test_command_without_metrics_does_not_import_the_client() -> None:
    code = (
        "import sys; from pageferry.cli.main import main; main(['checkpoint', 'pid:x', 'y']);"
        "sys.exit('prometheus_client' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_documentation_lists_every_metric() -> None:
    text = metrics.page()
    assert all(f"| `{metric.name}" in text for metric in METRICS)
