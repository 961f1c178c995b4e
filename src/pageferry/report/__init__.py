"""Output of commands: results on stdout and progress on stderr, human-readable or as JSON.

Each view of the human-readable output is imported on first use, because the views import rich.
"""

from typing import TYPE_CHECKING

from pageferry.lazy import lazily

if TYPE_CHECKING:
    from pageferry.report.check import CheckView
    from pageferry.report.checkpoint import CheckpointView
    from pageferry.report.control import ControlView
    from pageferry.report.image import ImageView
    from pageferry.report.large_pages import LargePagesView
    from pageferry.report.migration import DemoView, MigrationView, ReceiveView
    from pageferry.report.restore import RestoreView
    from pageferry.report.runs import RunsView
    from pageferry.report.sharing import SharingView
    from pageferry.report.top import TopView
    from pageferry.report.workloads import WorkloadsView

__all__ = [
    "CheckView",
    "CheckpointView",
    "ControlView",
    "DemoView",
    "ImageView",
    "LargePagesView",
    "MigrationView",
    "ReceiveView",
    "RestoreView",
    "RunsView",
    "SharingView",
    "TopView",
    "WorkloadsView",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "CheckView": "pageferry.report.check",
        "CheckpointView": "pageferry.report.checkpoint",
        "ControlView": "pageferry.report.control",
        "DemoView": "pageferry.report.migration",
        "ImageView": "pageferry.report.image",
        "LargePagesView": "pageferry.report.large_pages",
        "MigrationView": "pageferry.report.migration",
        "ReceiveView": "pageferry.report.migration",
        "RestoreView": "pageferry.report.restore",
        "RunsView": "pageferry.report.runs",
        "SharingView": "pageferry.report.sharing",
        "TopView": "pageferry.report.top",
        "WorkloadsView": "pageferry.report.workloads",
    },
)
