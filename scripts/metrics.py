"""Print the Metrics page of the documentation, generated from the list of metrics.

`make docs` adds the page to the site (`scripts/generated_pages.py`).
"""

from __future__ import annotations

from pageferry.report.metrics import EVENTS, INFO, METRICS

HEAD = f"""# Metrics

Verbs that may run for a long time (`migrate`, `receive`, `checkpoint`, `restore`, `large-pages`, `sharing`) serve
metrics to [Prometheus](https://prometheus.io) while they run:

    pageferry sharing web web2 --watch --metrics 127.0.0.1:9400

Port 0 selects a free port, which is logged. Addresses other than loopback require `--metrics-insecure`: replies are not
encrypted, and any client may request them. The client library is an extra: `pip install 'pageferry[metrics]'`. Metrics
end with the command; for a command that takes milliseconds, use `--log`.

Values come from the [events](events.md) of the command. A metric exists from the first event that contains it. Names do
not change. This page is generated from the code.

| metric | kind | meaning | from |
| --- | --- | --- | --- |
| `{INFO}` | gauge | Always 1; the labels `version`, `verb` and `subject` identify the command. | |
| `{EVENTS}_total` | counter | Number of events of the command, by the label `type`. | all |
"""


def page() -> str:
    """Return the text of the Metrics page, in Markdown."""
    rows = []
    for metric in METRICS:
        name = f"{metric.name}_total" if metric.kind == "counter" else metric.name
        origin = ", ".join(f"`{event}`" for event in metric.events)
        rows.append(f"| `{name}` | {metric.kind} | {metric.help} | {origin} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(page(), end="")
