"""Human-readable output of `pageferry check`: kernel features, systems, QEMU binaries and a summary."""

from __future__ import annotations

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.host.events import Check
from pageferry.host.probes import Feature
from pageferry.host.probes.systems import SystemReport
from pageferry.report.text import PlainView
from pageferry.stores.events import StoreCheck

_COLOURS = {"ok": "green", "fallback": "yellow", "unavailable": "red"}


class CheckView(PlainView):
    """View of the result of `pageferry check`."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the tables of features and systems, the QEMU binaries and the summary."""
        if isinstance(result, StoreCheck):
            return _steps(result)
        assert isinstance(result, Check)
        return Group(_features(result.features), _systems(result.systems), *_qemus(result), Text(), _summary(result))


def _steps(found: StoreCheck) -> RenderableType:
    table = _table("step", "passed", "detail")
    for step in found.steps:
        detail = Text(step.detail)
        if step.remedy:
            detail.append(f"\n→ {step.remedy}", style="italic")
        table.add_row(Text(step.name), Text("yes", "green") if step.passed else Text("no", "red"), detail)
    return Group(table, Text(f"{found.store}: {'usable' if found.usable else 'not usable'}"))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("feature", "system", "status", "available"))
    return table


def _features(features: list[Feature]) -> RenderableType:
    table = _table("feature", "available", "detail")
    for feature in features:
        found = Text(feature.detail)
        if feature.remedy:
            found.append(f"\n→ {feature.remedy}", style="italic")
        here = Text("yes", style="green") if feature.available else Text("no", style="yellow")
        table.add_row(Text(feature.name), here, found)
    return table


def _systems(systems: list[SystemReport]) -> RenderableType:
    table = _table("system", "status", "description", "mechanism")
    for system in systems:
        mechanism = Text(system.mechanism or "none")
        if system.missing:
            mechanism.append(f"\n→ better with {', '.join(system.missing)}: {system.preferred}", style="italic")
        table.add_row(
            Text(system.system),
            Text(system.status, style=_COLOURS[system.status]),
            Text(system.title),
            mechanism,
        )
    return Group(Text(), table)


def _qemus(result: Check) -> list[RenderableType]:
    if not result.qemu:
        return [
            Text(),
            Text("No QEMU in PATH: guests require qemu-system-x86_64 (Debian: apt install qemu-system-x86)."),
        ]
    return [Text(), *(Text(f"{qemu.path}: {qemu.detail}", "" if qemu.usable else "red") for qemu in result.qemu)]


def _summary(result: Check) -> Text:
    host = f"Linux {result.kernel}, user {result.user}"
    if not result.main_job:
        return Text(f"{host}: live migration is not possible.", style="red")
    moved = "arenas and QEMU guests" if any(qemu.usable for qemu in result.qemu) else "arenas"
    return Text(f"{host}: live migration of {moved} is possible.", style="green")
