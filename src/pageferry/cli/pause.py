"""`pageferry pause` and `pageferry resume`: pause guests, and let them run again."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Awaitable, Callable

from pageferry import report
from pageferry.control.events import RunStateResult, RunStateResults
from pageferry.control.pausing import pause_async, resume_async
from pageferry.errors import PageferryError
from pageferry.report.reporter import open_reporter

log = logging.getLogger(__name__)

_OPERATIONS: dict[str, Callable[[str], Awaitable[RunStateResult]]] = {"pause": pause_async, "resume": resume_async}


async def run(args: argparse.Namespace) -> int:
    """Pause or resume all guests, and print the results. Raises the first error after all guests have been tried."""
    results: list[RunStateResult] = []
    errors: list[PageferryError] = []
    for name in args.names:
        try:
            results.append(await _OPERATIONS[args.verb](name))
        except PageferryError as error:
            errors.append(error)
    with open_reporter(args.output, lambda: report.ControlView()) as reporter:
        if args.output == "human" and results:
            reporter.final(RunStateResults(results))
        elif args.output != "human":
            for result in results:
                reporter.event(result)
    for other in errors[1:]:
        log.error("%s", other)
    if errors:
        raise errors[0]
    return 0
