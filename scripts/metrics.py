"""Print docs/metrics.md, made from the list of metrics: `make docs/metrics.md` writes it."""

from __future__ import annotations

from pageferry.report.metrics import EVENTS, INFO, METRICS

HEAD = f"""# Metrics

Verbs that may run for long (`migrate`, `receive`, `checkpoint`, `restore`, `large-pages`, `sharing`) answer
[Prometheus](https://prometheus.io) while they run:

    pageferry sharing web web2 --watch --metrics 127.0.0.1:9400

The port may be 0; the one that was found is logged. Other addresses than loopback need `--metrics-insecure`: the answer
is not encrypted and anybody may ask. The client library is an extra: `pip install 'pageferry[metrics]'`. Metrics end
with the command; one that takes milliseconds is better read by its `--log`.

Values come from the [events](events.md) that the command tells. This page is made by `make docs/metrics.md` from the
code, and a test compares the two. A metric is there from the first event on that tells it; names stay.

| metric | kind | meaning | from |
| --- | --- | --- | --- |
| `{INFO}` | gauge | Always 1; the labels `version`, `verb` and `subject` say what runs. | |
| `{EVENTS}_total` | counter | Events that the command has told, by the label `type`. | all |
"""


def page() -> str:
    """The whole page."""
    rows = []
    for metric in METRICS:
        name = f"{metric.name}_total" if metric.kind == "counter" else metric.name
        origin = ", ".join(f"`{event}`" for event in metric.events)
        rows.append(f"| `{name}` | {metric.kind} | {metric.help} | {origin} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(page(), end="")
