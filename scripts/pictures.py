"""Create the pictures of the documentation in docs/pictures.

    python scripts/pictures.py            write layers.svg and, from a run of the demo, demo.svg and report.png
    python scripts/pictures.py layers     write layers.svg only

layers.svg shows the packages in the layers of the import contract in pyproject.toml. demo.svg shows a terminal with the
output of `pageferry demo`. report.png shows the upper part of its report, and requires Chromium.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
COMMAND = "pageferry demo"
COLUMNS = 130
CHARACTER, LINE, MARGIN = 7.25, 18, 16
"""Width of a character, height of a line, and margin, in pixels at a font size of 12."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REPORT_SIZE = (960, 690)
"""Width and height in pixels of the part of the report that is shown."""


def terminal(command: str, output: str) -> str:
    """Return an SVG of a terminal that shows a prompt with a command, and the output of the command."""
    lines = [
        f"$ {command}",
        *(part for line in output.splitlines() for part in textwrap.wrap(line, COLUMNS, subsequent_indent="  ")),
    ]
    width = round(2 * MARGIN + max(map(len, lines)) * CHARACTER)
    height = 2 * MARGIN + len(lines) * LINE
    text = "\n".join(
        f'<text x="{MARGIN}" y="{MARGIN + number * LINE + 13}"{_style(number)}>{_escape(line)}</text>'
        for number, line in enumerate(lines)
        if line
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="Output of {html.escape(command)}">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#1b1f24"/>\n'
        '<g font-family="ui-monospace, DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12" fill="#d6dbe1">\n'
        f"{text}\n</g>\n</svg>\n"
    )


def contract() -> list[list[str]]:
    """Return the packages of each layer, uppermost first, as import-linter checks them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one["type"] == "layers")
    return [re.findall(r"pageferry\.(\w+)", layer) for layer in layers]


def layers_picture(layers: list[list[str]]) -> str:
    """Return an SVG of the layers: a row of boxes per layer, and an arrow in the direction of imports."""
    width, height, gap = 640, 40, 12
    rows = [*layers, ["Linux: userfaultfd, pagemap, ptrace, tmpfs"]]
    parts = []
    for number, names in enumerate(rows):
        y = gap + number * (height + gap)
        box = (width - gap * (len(names) + 1)) / len(names)
        last = number == len(rows) - 1
        for column, name in enumerate(names):
            x = gap + column * (box + gap)
            parts.append(
                f'<rect x="{x:.0f}" y="{y}" width="{box:.0f}" height="{height}" rx="6" '
                f'fill="{"#eceff3" if last else "#dbe9fb"}" stroke="#5b6b7f"/>\n'
                f'<text x="{x + box / 2:.0f}" y="{y + 25}" text-anchor="middle">{html.escape(name)}</text>'
            )
    total = gap + len(rows) * (height + gap)
    arrow = f'<path d="M {width + 14} {gap} V {total - gap - 8} m -5 -8 l 5 8 l 5 -8" fill="none" stroke="#5b6b7f"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 100}" height="{total}" '
        f'viewBox="0 0 {width + 100} {total}" role="img" aria-label="Packages in layers">\n'
        f'<rect width="{width + 100}" height="{total}" fill="#ffffff"/>\n'
        '<g font-family="system-ui, sans-serif" font-size="14" fill="#1b1f24">\n'
        + "\n".join(parts)
        + f'\n{arrow}\n<text x="{width + 26}" y="{total // 2}">imports</text>\n</g>\n</svg>\n'
    )


def _escape(line: str) -> str:
    """Escape a line for SVG. Replace each space by a no-break space, because SVG collapses runs of spaces."""
    return html.escape(line).replace(" ", "\u00a0")


def _style(number: int) -> str:
    return ' fill="#7ee787"' if number == 0 else ""


def run_demo(log: Path) -> str:
    """Run the demo with an event log and return its output, with the process id replaced by 4711."""
    program = Path(sys.executable).parent / "pageferry"
    done = subprocess.run(
        [program, "demo", "--log", log],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": str(COLUMNS)},
    )
    return re.sub(r"demo-\d+", "demo-4711", done.stdout)


def photograph(page: Path, picture: Path) -> None:
    """Write the upper part of an HTML page as PNG. Exit with a message if there is no Chromium."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("cannot write the picture of the report: no Chromium in PATH; run `make system`")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--user-data-dir={profile}", f"--window-size={REPORT_SIZE[0]},{REPORT_SIZE[1]}"),
                *(f"--screenshot={picture}", page.as_uri()),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def main(arguments: list[str]) -> None:
    """Write layers.svg and, unless `arguments` is `["layers"]`, demo.svg and report.png."""
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "layers.svg").write_text(layers_picture(contract()))
    if arguments == ["layers"]:
        return
    with tempfile.TemporaryDirectory() as folder:
        log, page = Path(folder) / "demo.log", Path(folder) / "demo.html"
        (PICTURES / "demo.svg").write_text(terminal(COMMAND, run_demo(log)))
        program = Path(sys.executable).parent / "pageferry"
        subprocess.run([program, "report", log, "--html", page], check=True, stdout=subprocess.DEVNULL)
        photograph(page, PICTURES / "report.png")


if __name__ == "__main__":
    main(sys.argv[1:])
