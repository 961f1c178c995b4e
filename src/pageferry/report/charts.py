"""Charts as SVG text. The functions depend on their arguments only. Marks have tooltips, and the page contains a table
of the values below each chart.

Axes start at 0 unless their names contain `logarithmic`. Colours are numbers in the palette of the page: 1 transferred,
2 remaining, 3 activity of the workload, 4 destination or duplicate, 5 other, 0 muted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pageferry.report.svg import WIDTH, Format, Frame, binary_ticks, chart, element, text, ticks

Points = Sequence[tuple[float, float]]

MAX_LABELS = 9
"""Maximum number of labels below an axis; more labels would overlap."""


@dataclass(frozen=True, slots=True)
class Series:
    """Named series of values, one per group of columns, drawn in one colour."""

    name: str
    colour: int
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Line:
    """Line through points. `area`: whether the area below the line is tinted. `steps`: whether the line is drawn as
    horizontal steps."""

    name: str
    colour: int
    points: Points
    area: bool = False
    steps: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """Formatters of the values on both axes, and the name of the x axis. `binary`: whether the ticks of the y axis are
    round in binary units."""

    x: Format
    y: Format
    name: str
    binary: bool = True


@dataclass(frozen=True, slots=True)
class Bar:
    """Bar of a chart. `note`: label that is printed after the bar instead of its value."""

    name: str
    value: float
    colour: int = 1
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Strip:
    """Row of cells with values from 0 (empty) to 1 (full). `note`: label that is printed after the row."""

    name: str
    cells: Sequence[float]
    note: str = ""
    colour: int = 1


def columns(
    label: str, names: Sequence[str], series: Sequence[Series], form: Format, axis: str, *, binary: bool = False
) -> str:
    """Return a chart of vertical bars in groups. Each name is a group with one bar per series."""
    most = max((value for one in series for value in one.values), default=0)
    frame = Frame(max(len(names), 1), (binary_ticks if binary else ticks)(most))
    slot = frame.inner_width / max(len(names), 1)
    width = min(slot * 0.78 / max(len(series), 1), 42)
    parts = [frame.y_axis(form)]
    for number, name in enumerate(names):
        begin = frame.left + slot * (number + 0.5) - width * len(series) / 2
        for position, one in enumerate(series):
            value = one.values[number]
            top = frame.y(value)
            parts.append(
                element(
                    "rect",
                    title=f"{axis} {name}, {one.name}: {form(value)}",
                    x=begin + position * width + width * 0.05,
                    y=top,
                    width=width * 0.9,
                    height=frame.base - top,
                    rx=min(width * 0.1, 2),
                    class_=f"f{one.colour}",
                )
            )
    for number in range(0, len(names), -(-len(names) // MAX_LABELS) or 1):
        parts += [text(frame.left + slot * (number + 0.5), frame.base + 15, names[number], "middle", "tick")]
    parts += [frame.floor(), frame.x_name(axis)]
    return chart(frame.height, label, *parts)


def lines(label: str, drawn: Sequence[Line], axes: Axes, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Return a line chart. `marks` are positions on the x axis and their labels."""
    points = [point for one in drawn for point in one.points]
    most_x = max([x for x, _ in points] + [x for x, _ in marks], default=1) or 1
    frame = Frame(most_x, (binary_ticks if axes.binary else ticks)(max((y for _, y in points), default=0)), top=22)
    parts = [frame.y_axis(axes.y), frame.floor(), frame.x_axis(ticks(most_x, 5), axes.x, axes.name)]
    for one in drawn:
        parts += _line(frame, one, axes)
    for x, word in marks:
        parts.append(_mark(frame, frame.x(x), word))
    return chart(frame.height, label, *parts)


def _line(frame: Frame, line: Line, axes: Axes) -> list[str]:
    if not line.points:
        return []
    path, before = "", None
    for x, y in line.points:
        if line.steps and before is not None:
            path += f"L{frame.x(x):.1f} {frame.y(before):.1f}"
        path += f"{'L' if path else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}"
        before = y
    parts = []
    if line.area:
        first, last = frame.x(line.points[0][0]), frame.x(line.points[-1][0])
        closed = f"{path}L{last:.1f} {frame.base:.1f}L{first:.1f} {frame.base:.1f}Z"
        parts.append(element("path", d=closed, class_=f"f{line.colour} tint"))
    parts.append(element("path", d=path, class_=f"s{line.colour} line"))
    few = len(line.points) <= 30
    for x, y in line.points if few else line.points[:: -(-len(line.points) // 30)]:
        title = f"{line.name}: {axes.y(y)} at {axes.x(x)}"
        hidden = "" if few and not line.steps else " unseen"
        dot = f"f{line.colour}{hidden}"
        parts.append(element("circle", title=title, cx=frame.x(x), cy=frame.y(y), r=3 if few else 6, class_=dot))
    return parts


def _mark(frame: Frame, x: float, word: str) -> str:
    anchor = "end" if x > WIDTH * 0.75 else "start"
    shift = -4 if anchor == "end" else 4
    line = element("line", x1=x, x2=x, y1=frame.top - 8, y2=frame.base, class_="mark")
    return line + text(x + shift, frame.top - 2, word, anchor, "note")


def histogram(
    label: str, edges: Sequence[str], counts: Sequence[int], axis: str, marks: Sequence[tuple[float, str]]
) -> str:
    """Return a histogram. Bin k has `counts[k]` and lies between `edges[k]` and `edges[k + 1]`. `marks` are positions,
    in bins from the left, and their labels."""
    frame = Frame(len(counts) or 1, ticks(max(counts, default=0)), top=12 + 11 * len(marks))
    parts = [frame.y_axis(lambda value: f"{value:,.0f}")]
    for number, count in enumerate(counts):
        left, top = frame.x(number), frame.y(count)
        title = f"{edges[number]} to {edges[number + 1]}: {count:,}"
        parts.append(
            element(
                "rect",
                title=title,
                x=left + 0.75,
                y=top,
                width=max(frame.x(number + 1) - left - 1.5, 0.5),
                height=frame.base - top,
                class_="f1",
            )
        )
    for number in range(0, len(edges), -(-len(edges) // MAX_LABELS)):
        parts += [text(frame.x(number), frame.base + 15, edges[number], "middle", "tick")]
    for row, (place, word) in enumerate(marks):
        x, y = frame.x(place), 10.0 + 11 * row
        anchor, shift = ("end", -4) if x > WIDTH * 0.65 else ("start", 4)
        parts.append(element("line", x1=x, x2=x, y1=y - 7, y2=frame.base, class_="mark"))
        parts.append(text(x + shift, y, word, anchor, "note"))
    parts += [frame.floor(), frame.x_name(axis)]
    return chart(frame.height, label, *parts)


def bars(label: str, rows: Sequence[Bar], form: Format) -> str:
    """Return a chart of horizontal bars with their values."""
    row_height, left, right = 24.0, 106.0, 72.0
    most = max((row.value for row in rows), default=0) or 1
    parts = []
    for number, row in enumerate(rows):
        y = 4 + number * row_height
        width = (WIDTH - left - right) * row.value / most
        title = row.note or form(row.value)
        parts.append(text(left - 8, y + 14, row.name, "end", "label"))
        parts.append(
            element(
                "rect",
                title=f"{row.name}: {title}",
                x=left,
                y=y + 3,
                width=max(width, 0.75 if row.value else 0),
                height=row_height - 9,
                rx=2,
                class_=f"f{row.colour}",
            )
        )
        parts.append(text(left + width + 6, y + 14, title, "start", "value"))
    return chart(8 + len(rows) * row_height, label, *parts)


def stack(label: str, parts: Sequence[Bar], form: Format) -> str:
    """Return a horizontal bar that is divided in proportion to the parts."""
    whole = sum(part.value for part in parts) or 1
    drawn, x = [], 0.0
    for part in parts:
        width = WIDTH * part.value / whole
        share = f"{part.name}: {part.note or form(part.value)} ({part.value / whole:.1%})"
        drawn.append(
            element("rect", title=share, x=x, y=2, width=max(width - 1, 0), height=30, class_=f"f{part.colour}")
        )
        x += width
    return chart(34, label, *drawn)


def strips(label: str, rows: Sequence[Strip], left: str = "", right: str = "") -> str:
    """Return rows of cells, which are darker for higher values. `left` and `right` are labels for the ends of the
    rows."""
    height, note = 30.0, 74.0 if any(row.note for row in rows) else 0.0
    space = WIDTH - note
    parts = []
    for number, row in enumerate(rows):
        y = number * (height + 12)
        parts.append(text(0, y + 11, row.name, "start", "label"))
        parts.append(element("rect", x=0, y=y + 15, width=space, height=height - 12, class_="track"))
        parts.append(_cells(row, 0, y + 15, space, height - 12))
        if row.note:
            parts.append(text(WIDTH, y + 28, row.note, "end", "value"))
    end = len(rows) * (height + 12)
    parts += [text(0, end + 4, left, "start", "tick"), text(space, end + 4, right, "end", "tick")]
    return chart(end + 8, label, *parts)


def heat(label: str, rows: Sequence[Strip], axis: str) -> str:
    """Return a heat map of thin named rows."""
    row_height, left, right = 13.0, 92.0, 34.0
    space = WIDTH - left - right
    parts = []
    for number, row in enumerate(rows):
        y = 2 + number * row_height
        parts.append(text(left - 6, y + 9.5, row.name, "end", "small"))
        parts.append(element("rect", x=left, y=y, width=space, height=row_height - 1.5, class_="track"))
        parts.append(_cells(row, left, y, space, row_height - 1.5))
        parts.append(text(WIDTH - right + 6, y + 9.5, row.note, "start", "small"))
    end = 2 + len(rows) * row_height
    parts.append(text(left + space / 2, end + 13, axis, "middle", "name"))
    return chart(end + 18, label, *parts)


def _cells(row: Strip, x: float, y: float, width: float, height: float) -> str:
    """Return the cells of a row as SVG, with one rectangle per run of identical cells."""
    parts, cell = [], width / max(len(row.cells), 1)
    start = 0
    for number in range(1, len(row.cells) + 1):
        if number < len(row.cells) and row.cells[number] == row.cells[start]:
            continue
        share = row.cells[start]
        if share > 0:
            parts.append(
                element(
                    "rect",
                    title=f"{row.name}: {share:.0%}",
                    x=x + start * cell,
                    y=y,
                    width=(number - start) * cell,
                    height=height,
                    fill_opacity=round(0.18 + 0.82 * share, 2),
                    class_=f"f{row.colour}",
                )
            )
        start = number
    return "".join(parts)


def dots(label: str, points: Points, most: tuple[float, float], axes: Axes) -> str:
    """Return a scatter plot. `most` contains the maximum values of the x axis and of the y axis."""
    frame = Frame(most[0] or 1, binary_ticks(most[1]))
    parts = [frame.y_axis(axes.y), frame.floor(), frame.x_axis(ticks(most[0], 5), axes.x, axes.name)]
    for x, y in points:
        title = f"{axes.x(x)}: {axes.y(y)}"
        parts.append(
            element("rect", title=title, x=frame.x(x) - 1, y=frame.y(y) - 1, width=2.2, height=2.2, class_="f1")
        )
    return chart(frame.height, label, *parts)
