"""SVG text: elements, axes and scales shared by all charts.

Colours are CSS variables of the page (`--c1` and so on), so that charts use the light or dark palette of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 400
"""Width of every chart, SVG user units. With this width, text of size 11 is readable on a display of 390 pixels."""

Format = Callable[[float], str]


def element(name: str, content: str = "", title: str | None = None, **attributes: float | str | None) -> str:
    """Return an SVG element. Underscores in names of attributes become hyphens. `title` is the tooltip."""
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = (f"<title>{escape(title)}</title>" if title else "") + content
    return f"<{name}{''.join(pairs)}>{inner}</{name}>" if inner else f"<{name}{''.join(pairs)}/>"


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None) -> str:
    """Return a line of text with its baseline at `y`."""
    return element("text", escape(content), x=x, y=y, text_anchor=anchor, class_=class_)


def chart(height: float, label: str, *content: str) -> str:
    """Return the svg element of a chart; `label` describes it for screen readers."""
    box = f"0 0 {WIDTH} {_value(height)}"
    return element("svg", "".join(content), role="img", aria_label=label, viewBox=box, width=WIDTH, height=height)


def _value(value: float | str) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{value:.2f}".rstrip("0").rstrip(".")


def ticks(most: float, count: int = 4, steps: Sequence[float] = (1, 2, 5, 10)) -> list[float]:
    """Return about `count` equidistant round numbers, from 0 to the first that is at least `most`."""
    if not most > 1e-300 or not math.isfinite(most):
        return [0.0, 1.0]
    rough = most / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in steps if step * power >= rough * 0.999)
    return [number * step for number in range(math.ceil(most / step - 1e-9) + 1)]


def binary_ticks(most: float, count: int = 4) -> list[float]:
    """Return ticks for a number of bytes: round numbers in a binary unit."""
    unit = 1024.0 ** max(int(math.log(max(most, 1), 1024) + 1e-9), 0)
    return [tick * unit for tick in ticks(most / unit, count)]


@dataclass(frozen=True, slots=True)
class Frame:
    """Plot area of a chart: position and range of its axes, both of which start at 0."""

    most_x: float
    ticks_y: Sequence[float]
    height: float = 210
    left: float = 58
    top: float = 12
    right: float = 12
    bottom: float = 34

    @property
    def inner_width(self) -> float:
        """Width of the plot area, user units."""
        return WIDTH - self.left - self.right

    @property
    def base(self) -> float:
        """Position of the x axis, user units from the top."""
        return self.height - self.bottom

    def x(self, value: float) -> float:
        """Return the position of a value on the x axis, user units from the left."""
        return self.left + self.inner_width * value / (self.most_x or 1)

    def y(self, value: float) -> float:
        """Return the position of a value on the y axis, user units from the top."""
        return self.base - (self.base - self.top) * value / (self.ticks_y[-1] or 1)

    def y_axis(self, form: Format) -> str:
        """Return the horizontal grid lines and their labels."""
        parts = []
        for tick in self.ticks_y:
            y = self.y(tick)
            parts.append(element("line", x1=self.left, x2=WIDTH - self.right, y1=y, y2=y, class_="grid"))
            parts.append(text(self.left - 6, y + 3.5, form(tick), "end", "tick"))
        return "".join(parts)

    def x_axis(self, ticks_x: Iterable[float], form: Format, name: str) -> str:
        """Return the tick marks of the x axis with their labels, and the name of the axis."""
        parts = []
        for tick in ticks_x:
            if tick > self.most_x * 1.0001:
                break
            x = self.x(tick)
            parts.append(element("line", x1=x, x2=x, y1=self.base, y2=self.base + 4, class_="axis"))
            parts.append(text(x, self.base + 15, form(tick), "middle", "tick"))
        parts.append(self.x_name(name))
        return "".join(parts)

    def x_name(self, name: str) -> str:
        """Return the text element with the name of the x axis."""
        return text(self.left + self.inner_width / 2, self.height - 3, name, "middle", "name")

    def floor(self) -> str:
        """Return the line of the x axis."""
        return element("line", x1=self.left, x2=WIDTH - self.right, y1=self.base, y2=self.base, class_="axis")
