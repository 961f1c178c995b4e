"""Print a random sample of the texts of this project, for a reader to judge.

    scripts/sample_texts.py [SEED] [COUNT]

SEED is hexadecimal (default: the first 8 digits of the parent of HEAD), COUNT the number of texts (default: 120). Texts
are docstrings, comments, paragraphs of the documentation, error messages, and help of options. Each text is printed
with its kind, file and line. Generated files are left out.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import re
import subprocess
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
GENERATED = ("docs/results.md", "packaging/")
COUNT = 120
MIN_WORDS = 3
"""Minimum number of words of a text, which excludes names and `# noqa`."""

_ERROR = re.compile(r"(Error|Refused|Lost|Exception|Warning|NotConverging|Unsupported)$")
_DIRECTIVE = re.compile(r"#\s*(noqa|type:|pragma|!)")
_RUST = re.compile(r"^\s*(///|//!|//)(.*)$")


@dataclass(frozen=True, slots=True)
class Text:
    """Text and its location."""

    kind: str
    path: str
    line: int
    words: str


def tracked(*patterns: str) -> list[str]:
    """Return the paths of tracked files that match a pattern, without generated files."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for path in listed.splitlines() if not path.startswith(GENERATED)]


def python_texts(path: str, source: str) -> Iterator[Text]:
    """Yield the docstrings (including those of fields), error messages, option help and comments of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield Text("docstring", path, node.lineno, textwrap.dedent(node.value.value).strip())
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if _ERROR.search(name) and node.args and (words := _string(node.args[0])):
                yield Text("error", path, node.lineno, words)
            for keyword in node.keywords:
                if keyword.arg in ("help", "description", "epilog") and (words := _string(keyword.value)):
                    yield Text("help", path, keyword.value.lineno, words)
    yield from python_comments(path, source)


def python_comments(path: str, source: str) -> Iterator[Text]:
    """Yield the comments of a Python file. Consecutive comment lines are one text."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT and not _DIRECTIVE.match(token.string)]
    found = [(*token.start, token.string.lstrip("# ")) for token in comments]
    yield from _joined("comment", path, found)


def rust_texts(path: str, source: str) -> Iterator[Text]:
    """Yield doc comments and comments of a Rust file. Consecutive comment lines are one text."""
    found = []
    for number, line in enumerate(source.splitlines(), 1):
        if matched := _RUST.match(line):
            found.append((number, len(line) - len(line.lstrip()), matched[2].strip()))
    yield from _joined("comment", path, found)


def markdown_texts(path: str, source: str) -> Iterator[Text]:
    """Yield paragraphs, list items and headings outside of code blocks and tables."""
    outside = re.sub(r"^( *)```.*?^\1```", lambda match: "\n" * match[0].count("\n"), source, flags=re.S | re.M)
    line = 1
    for block in re.split(r"(\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) ))", outside):
        if (words := block.strip()) and not words.startswith(("|", "<", "![", ":::", "---")):
            yield Text("documentation", path, line + block[: block.index(words[0])].count("\n"), words)
        line += block.count("\n")


def _string(node: ast.expr) -> str:
    """Return the value of a string literal, with {} for replacement fields of an f-string; empty for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return ""


def _joined(kind: str, path: str, found: list[tuple[int, int, str]]) -> Iterator[Text]:
    run: list[tuple[int, int, str]] = []
    for entry in [*found, (-1, -1, "")]:
        if run and (entry[0] != run[-1][0] + 1 or entry[1] != run[-1][1]):
            yield Text(kind, path, run[0][0], " ".join(words for _, _, words in run if words))
            run = []
        run.append(entry)


def texts() -> list[Text]:
    """Return all texts of the project, in a fixed order."""
    readers = {"*.py": python_texts, "*.pyi": python_texts, "*.rs": rust_texts, "*.md": markdown_texts}
    found = [
        text
        for pattern, read in readers.items()
        for path in tracked(pattern)
        for text in read(path, (ROOT / path).read_text())
    ]
    return sorted(
        (text for text in found if len(text.words.split()) >= MIN_WORDS),
        key=lambda text: (text.path, text.line, text.kind),
    )


def _seed(text: str) -> str:
    try:
        int(text, 16)
    except ValueError as wrong:
        raise argparse.ArgumentTypeError(f"invalid seed {text!r}: expected a hexadecimal number") from wrong
    return text


def _seed_of_parent() -> str:
    parent = ["git", "rev-parse", "--short=8", "HEAD^"]
    return subprocess.check_output(parent, cwd=ROOT, text=True).strip()[:8]


def main() -> None:
    """Print the sample."""
    parser = argparse.ArgumentParser(description="Print a random sample of the texts of this project.")
    parser.add_argument("seed", nargs="?", metavar="SEED", type=_seed, help="hexadecimal number (default: from HEAD^)")
    parser.add_argument("count", nargs="?", metavar="COUNT", type=int, default=COUNT, help="number of texts (120)")
    args = parser.parse_args()
    seed, found = args.seed or _seed_of_parent(), texts()
    count = min(args.count, len(found))
    print(f"{count} of {len(found)} texts, seed {seed}")
    for number, text in enumerate(random.Random(int(seed, 16)).sample(found, count), 1):
        print(f"\n[{number}] {text.kind}, {text.path}:{text.line}\n{textwrap.indent(text.words, '    ')}")


if __name__ == "__main__":
    main()
