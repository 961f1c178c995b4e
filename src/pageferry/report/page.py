"""Report as one self-contained HTML file without scripts, for light and dark displays, phones and paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from pageferry.printable import printable
from pageferry.report.figures.base import Fact, Figure, shown
from pageferry.report.run import Run, families, side_by_side
from pageferry.report.units import duration

MARKS = {"done": "done", "failed": "failed", "interrupted": "interrupted", "unfinished": "unfinished"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(runs: Sequence[Run]) -> str:
    """Return the HTML text of a report of the runs."""
    titles = ", ".join(run.title for run in runs)
    style = (files(__package__) / "page.css").read_text(encoding="utf-8")
    several = " several" if len(runs) > 1 else ""
    body = "".join(_run(run, number) for number, run in enumerate(runs))
    numbers = {run.log.path: number for number, run in enumerate(runs)}
    comparisons = "".join(_comparison(family, numbers) for family in families(runs))
    return printable(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        f"<title>{escape(titles)} – pageferry</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<p class="brand">pageferry report</p>\n{comparisons}'
        f'<main class="runs{several}">\n{body}</main>\n</body>\n</html>\n'
    )


def _comparison(runs: Sequence[Run], numbers: dict[Path, int]) -> str:
    heads = "".join(
        f'<th scope="col"><a href="#run-{numbers[run.log.path]}">{escape(run.title)}</a>'
        f"<br><small>{escape(run.log.path.name)}</small></th>"
        for run in runs
    )
    outcome = "".join(f'<td><span class="badge {run.outcome}">{MARKS[run.outcome]}</span></td>' for run in runs)
    rows = [f'<tr><th scope="row">outcome</th>{outcome}</tr>']
    for fact, values in side_by_side(runs):
        cells = "".join(f"<td>{escape(shown(value, fact.unit))}</td>" for value in values)
        rows.append(f'<tr><th scope="row">{escape(fact.name)}</th>{cells}</tr>')
    return (
        '<section class="comparison"><h2>Side by side</h2><div class="scroll"><table>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p>Each chart below has its own scale: compare the numbers.</p></section>\n"
    )


def _run(run: Run, number: int) -> str:
    header = run.log.header
    started = header.started.replace("T", " ").replace("Z", " UTC")
    where = (f"took {duration(run.took / 1e3)}", header.host, f"Linux {header.kernel}", f"pageferry {header.pageferry}")
    meta = " · ".join((f'<time datetime="{escape(header.started)}">{escape(started)}</time>', *map(escape, where)))
    message = f'<p class="message {run.outcome}">{escape(run.message)}</p>' if run.message else ""
    verb = f'<p class="verb">{escape(header.verb)}</p>' if run.subject else ""
    leads = "".join(_lead(fact) for fact in run.facts if fact.lead)
    rest = "".join(_fact(fact) for fact in run.facts if not fact.lead and fact.value is not None)
    figures = "".join(_figure(figure, number) for figure in run.figures)
    nothing = "" if run.facts or run.figures else "<p>This log contains no events for a chart.</p>"
    return (
        f'<article id="run-{number}">\n<header>{verb}'
        f'<h1>{escape(run.subject or header.verb)} <span class="badge {run.outcome}">{MARKS[run.outcome]}</span></h1>'
        f'<p class="meta">{meta}</p></header>\n{message}{nothing}'
        + (f'<dl class="leads">{leads}</dl>\n' if leads else "")
        + f'<div class="figures">{figures}</div>\n'
        + (
            f'<section class="rest"><h2>Further measurements</h2><dl class="facts">{rest}</dl></section>\n'
            if rest
            else ""
        )
        + f"{_arguments(run)}</article>\n"
    )


def _lead(fact: Fact) -> str:
    note = f'<dd class="note">{escape(fact.note)}</dd>' if fact.note else ""
    return f"<div><dt>{escape(fact.name)}</dt><dd>{escape(shown(fact.value, fact.unit))}</dd>{note}</div>"


def _fact(fact: Fact) -> str:
    note = f" <small>{escape(fact.note)}</small>" if fact.note else ""
    return f"<div><dt>{escape(fact.name)}</dt><dd>{escape(shown(fact.value, fact.unit))}{note}</dd></div>"


def _figure(figure: Figure, number: int) -> str:
    legend = "".join(f'<li><i class="f{colour}"></i>{escape(name)}</li>' for colour, name in figure.legend)
    return (
        f'<figure id="{figure.name}-{number}"><h2>{escape(figure.title)}</h2>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f"{figure.svg}<figcaption>{escape(figure.caption)}</figcaption>{_table(figure)}</figure>\n"
    )


def _table(figure: Figure) -> str:
    kinds = ["" if unit == "text" else ' class="number"' for _, unit in figure.columns]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>' for (name, _), kind in zip(figure.columns, kinds, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(shown(value, unit))}</td>"
            for value, (_, unit), kind in zip(row, figure.columns, kinds, strict=True)
        )
        + "</tr>"
        for row in figure.rows
    )
    return (
        '<details><summary>Numbers</summary><div class="scroll"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _arguments(run: Run) -> str:
    given = {name: value for name, value in run.log.header.arguments.items() if value not in (None, [], "", False)}
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in given.items())
    return f'<details class="arguments"><summary>Command line</summary><dl class="facts">{rows}</dl></details>'
