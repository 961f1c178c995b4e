"""How `pageferry check` looks to a person: two tables and a verdict."""

from __future__ import annotations

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.host.check import Check
from pageferry.host.features import Feature
from pageferry.host.systems import SystemReport
from pageferry.report.text import PlainView

_COLOURS = {"ok": "green", "fallback": "yellow", "unavailable": "red"}


class CheckView(PlainView):
    """Shows a `Check`."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Features with remedies, systems with mechanisms, QEMUs, and the verdict."""
        assert isinstance(result, Check)
        return Group(_features(result.features), _systems(result.systems), *_qemus(result), Text(), _verdict(result))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("feature", "system", "status", "here"))
    return table


def _features(features: list[Feature]) -> RenderableType:
    table = _table("feature", "here", "found")
    for feature in features:
        found = Text(feature.detail)
        if feature.remedy:
            found.append(f"\n→ {feature.remedy}", style="italic")
        here = Text("yes", style="green") if feature.available else Text("no", style="yellow")
        table.add_row(Text(feature.name), here, found)
    return table


def _systems(systems: list[SystemReport]) -> RenderableType:
    table = _table("system", "status", "included", "what it is", "mechanism here")
    for system in systems:
        mechanism = Text(system.mechanism or "none")
        if system.missing:
            mechanism.append(f"\n→ better with {', '.join(system.missing)}: {system.preferred}", style="italic")
        table.add_row(
            Text(system.system),
            Text(system.status, style=_COLOURS[system.status]),
            Text("yes" if system.included else "later", style="" if system.included else "dim"),
            Text(system.title),
            mechanism,
        )
    return Group(Text(), table)


def _qemus(result: Check) -> list[RenderableType]:
    if not result.qemu:
        return [Text(), Text("No QEMU in PATH: guests need qemu-system-x86_64 (Debian: apt install qemu-system-x86).")]
    return [Text(), *(Text(f"{qemu.path}: {qemu.detail}", "" if qemu.usable else "red") for qemu in result.qemu)]


def _verdict(result: Check) -> Text:
    who = f"Linux {result.kernel}, user {result.user}"
    if not result.main_job:
        return Text(f"{who}: live migration cannot run here.", style="red")
    moved = "arenas and QEMU guests" if any(qemu.usable for qemu in result.qemu) else "arenas"
    return Text(f"{who}: live migration of {moved} can run.", style="green")
