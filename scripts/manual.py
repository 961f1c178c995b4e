"""Write man pages and shell completions, generated from the argument parser, to packaging/data/share.

    python scripts/manual.py            # writes the files
    python scripts/manual.py --check    # prints the names of stale files; exit code 1 if there are any

The files are part of the wheel. They are in git because maturin copies them into the wheel and cannot run the parser.
Without them, `pip install` of a checkout would install no manual. A test compares the files with the parser.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

from pageferry.cli.parser import build_parser
from pageferry.cli.verbs import VERBS

SHARE = Path(__file__).parent.parent / "packaging" / "data" / "share"
MANUAL = "pageferry manual"


def pages() -> Iterator[tuple[str, str]]:
    """Yield the path below packaging/data/share and the contents of each file."""
    parser = build_parser([*VERBS, "--help"])
    summary = parser.description or ""
    also = [f"pageferry-{verb}" for verb in VERBS]
    yield "man/man1/pageferry.1", _page("pageferry", parser, summary, also)
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for verb, below in verbs.choices.items():
        yield f"man/man1/pageferry-{verb}.1", _page(f"pageferry-{verb}", below, VERBS[verb].help, ["pageferry"])
    yield "bash-completion/completions/pageferry", shtab.complete(parser, "bash") + "\n"
    yield "zsh/site-functions/_pageferry", shtab.complete(parser, "zsh") + "\n"


def _page(name: str, parser: argparse.ArgumentParser, summary: str, also: list[str]) -> str:
    page = str(Manpage(parser))
    body = page[page.index(".SH SYNOPSIS") :]
    head = f'.TH {name.upper()} "1" "" "pageferry" "{MANUAL}"\n.SH NAME\n{name} \\- {summary.rstrip(".")}\n'
    end = ".SH SEE ALSO\n" + ",\n".join(f".BR {other} (1)" for other in also) + "\n"
    return head + body.rstrip() + "\n" + end


def main() -> int:
    """Write the files, or check them with `--check`. Return the exit code: 1 if a checked file is stale."""
    os.environ["COLUMNS"] = "80"  # line length of the help texts; the default is the width of the terminal
    stale = []
    for path, contents in pages():
        file = SHARE / path
        if not file.exists() or file.read_text() != contents:
            stale.append(path)
            if "--check" not in sys.argv:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(contents)
    if "--check" in sys.argv and stale:
        print("stale, run `make manual`: " + ", ".join(stale))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
