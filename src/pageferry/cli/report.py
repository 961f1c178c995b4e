"""`pageferry report`: summarise event logs as text, JSON or one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from pageferry import report
from pageferry.errors import UsageError
from pageferry.host import files
from pageferry.report.event_log import Log
from pageferry.report.events import ReportResult
from pageferry.report.reporter import open_reporter
from pageferry.report.run import Run


def run(args: argparse.Namespace) -> int:
    """Read the logs, write the HTML page if `--html` is given, and print the report."""
    runs = [Run.of(Log.read(path)) for path in args.runs]
    if args.html is not None:
        from pageferry.report.page import page

        _write(args.html, page(runs))
    written = str(args.html) if args.html is not None else None
    with open_reporter(args.output, lambda: report.RunsView(runs)) as out:
        out.final(ReportResult(runs=[run.record() for run in runs], html=written))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        files.replace_file(path, text.encode(), mode=0o666)
    except OSError as error:
        raise UsageError(f"cannot write --html {path}: {error.strerror}") from error
