"""Output of verbs that control workloads: `pause`, `resume` and `shutdown`."""

from __future__ import annotations

import msgspec
from rich.console import RenderableType
from rich.text import Text

from pageferry.control.events import RunStateResult, RunStateResults, StopResult
from pageferry.report.text import PlainView
from pageferry.report.units import ms


class ControlView(PlainView):
    """View with one line per workload."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return a line for each workload of the result."""
        match result:
            case RunStateResults(results=results):
                return Text("\n".join(map(_run_state, results)))
            case StopResult():
                how, why = ("stopped", ", because it did not shut down") if result.forced else ("shut down", "")
                return Text(f"{result.workload}: {how} after {ms(result.duration_ms)}{why}")
            case _:
                return super().result(result)


def _run_state(result: RunStateResult) -> str:
    return f"{result.workload}: {'' if result.changed else 'already '}{result.status}"
