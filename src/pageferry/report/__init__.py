"""Output of commands: results on stdout and progress on stderr, human-readable or as JSON.

Each view of the human-readable output is imported on first use, because the views import rich.
"""

from typing import TYPE_CHECKING

from pageferry.lazy import lazily

if TYPE_CHECKING:
    from pageferry.report.check import CheckView
    from pageferry.report.checkpoint import CheckpointView
    from pageferry.report.clone import CloneView
    from pageferry.report.control import ControlView
    from pageferry.report.disks import DisksView
    from pageferry.report.fleet import FleetView
    from pageferry.report.image import ImageView
    from pageferry.report.large_pages import LargePagesView
    from pageferry.report.migration import DemoView, MigrationView, ReceiveView
    from pageferry.report.restore import RestoreView
    from pageferry.report.runs import RunsView
    from pageferry.report.serve import ServeView
    from pageferry.report.sharing import SharingView
    from pageferry.report.stores import CacheView
    from pageferry.report.top import TopView
    from pageferry.report.workloads import WorkloadsView

__all__ = [
    "CacheView",
    "CheckView",
    "CheckpointView",
    "CloneView",
    "ControlView",
    "DemoView",
    "DisksView",
    "FleetView",
    "ImageView",
    "LargePagesView",
    "MigrationView",
    "ReceiveView",
    "RestoreView",
    "RunsView",
    "ServeView",
    "SharingView",
    "TopView",
    "WorkloadsView",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "CacheView": "pageferry.report.stores",
        "CheckView": "pageferry.report.check",
        "CheckpointView": "pageferry.report.checkpoint",
        "CloneView": "pageferry.report.clone",
        "ControlView": "pageferry.report.control",
        "DemoView": "pageferry.report.migration",
        "DisksView": "pageferry.report.disks",
        "FleetView": "pageferry.report.fleet",
        "ImageView": "pageferry.report.image",
        "LargePagesView": "pageferry.report.large_pages",
        "MigrationView": "pageferry.report.migration",
        "ReceiveView": "pageferry.report.migration",
        "RestoreView": "pageferry.report.restore",
        "RunsView": "pageferry.report.runs",
        "ServeView": "pageferry.report.serve",
        "SharingView": "pageferry.report.sharing",
        "TopView": "pageferry.report.top",
        "WorkloadsView": "pageferry.report.workloads",
    },
)
