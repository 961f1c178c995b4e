"""Count phrases that CONTRIBUTING discourages, per file.

    python scripts/wording.py            print the hits in files that exceed the table
    python scripts/wording.py --all      print all hits
    python scripts/wording.py --update   update the table, unless a count has grown

The table, scripts/wording.json, contains the number of hits of each file. A count may only decrease: the test
`tests/unit/test_wording.py` fails if a file has more hits than the table allows.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".json")

GENERATED = ("packaging/", "benchmarks/results/", "CHANGELOG.md")
"""Path prefixes that are not searched: generated files, and the changelog of past releases."""
THEMSELVES = ("scripts/wording.py", "CONTRIBUTING.md")

PHRASES = {
    r"(?i)\b(nobody|somebody|anybody|everybody)\b": "no process, another thread, each user: name the actor",
    r"(?i)\b(whoever|himself|oneself)\b": "the process that; itself",
    r"\b(for|by|before|but|of|from) who\b": "the caller that",
    r'^\s*("""|///|//!)\s*(What|Of|Those|That|Who|It|They|As of|See there)\b': "begin with a noun or an imperative",
    r"(?<![Tt]here )\b(is|are|was|were) no (?!longer|more|such|match)[a-z]": "is not a; is invalid",
    r"(?<![Tt]here )\b(is|are|was|were) none\b": "is invalid; is not one",
    r"\bbe had\b": "cannot be read, loaded, allocated",
    r"\b(still|yet) to come\b": "deferred",
    r"\bany more\b": "no longer",
    r"\b(go|goes|went|gone|going) on\b": "continue; take over",
    r"\b(stand|stands|stood) (on|in|elsewhere|there)\b": "is backed by; is stored in",
    r"\blet(s|ting)? (\w+ ){0,3}go\b": "evict; release; resume",
    r"\b(give|gives|given|gave|giving) (\w+ ){0,2}back\b": "discard; free; return",
    r"(?i)\bbeliev(e|es|ed)\b": "authenticate; trust",
    r"(?i)patience": "timeout",
    r"\b(the|this|that|one|each|earlier|older) instant\b": "snapshot point",
    r"\ban? ([\w-]+ ){1,3}of (its|their|our|one's) own\b(?! accord)": "a separate, a private",
    r"\bof ours\b": "our, pageferry's",
    r"\b(is|are|was|were|be|been) told\b": "is notified; is reported",
    r"(?i)\b(whatever|whichever)\b(?! (?:the|their|its|happens)\b)": "any; regardless of",
    r"\b(so many|as far as|anew|for good|at work)\b": "N; up to; again; permanently; running",
    r"\b(makes? no sense|h[au]ngs? up|owe[sd]?)\b": "is invalid; closes the connection; must still send",
    r"\b(look(s|ed|ing)? whether|g[eo]ts? (any |no )?further)\b": "check whether; converge",
    r"\bhow far (it|they|we|the \w+|a \w+) (is|are|has)\b": "progress",
    r"\b(is|are|be|was|still|somebody) at it\b": "in progress",
    r"\b(write|wrote|written|writes|writing) down\b": "record",
    r"\b(takes?|taken|took|taking) ((it|them|(the|all|every) \w+) )?off\b": "remove; unprotect",
    r"\b(for people|to a person)\b": "human-readable",
    r"\b(MOST|LEAST|LARGEST|LONGEST|MANY|FEW)(_[A-Z]+)*\b": "MAX_, MIN_",
    r"def test_(what|who|nobody|nothing|somebody|it|one|those|half|told)_": "name the subject of the test",
}
"""Regular expressions, searched in each line, with the recommended words."""

_COMPILED = [(re.compile(phrase), instead) for phrase, instead in PHRASES.items()]


def files() -> Iterator[str]:
    """Yield the paths of the files to search, relative to the root of the tree, sorted."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.pyi", "*.rs", "*.md"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for path in sorted(set(listed)):
        if not path.startswith(GENERATED) and path not in THEMSELVES and (ROOT / path).is_file():
            yield path


def hits(path: str) -> Iterator[tuple[int, str, str]]:
    """Yield number and text of each line with a discouraged phrase, with the recommended words; one item per phrase."""
    for number, line in enumerate((ROOT / path).read_text().splitlines(), start=1):
        for phrase, instead in _COMPILED:
            if phrase.search(line):
                yield number, line.strip(), instead


def counts() -> dict[str, int]:
    """Return the number of hits per file, without files that have none."""
    found = Counter({path: sum(1 for _ in hits(path)) for path in files()})
    return {path: count for path, count in found.items() if count}


def table() -> dict[str, int]:
    """Return the number of hits allowed per file. It is 0 for files that are not in the table."""
    allowed: dict[str, int] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return allowed


def grown() -> dict[str, int]:
    """Return the files with more hits than the table allows, with their number of hits."""
    allowed = table()
    return {path: count for path, count in counts().items() if count > allowed.get(path, 0)}


def _print(paths: list[str]) -> None:
    for path in paths:
        for number, line, instead in hits(path):
            print(f"{path}:{number}: {line}   => {instead}")


def main(arguments: list[str]) -> int:
    """Run the script. Return the exit code: 1 if a count has grown."""
    if arguments == ["--all"]:
        _print(list(files()))
        return 0
    more = list(grown()) if TABLE.exists() else []
    _print(more)
    if arguments == ["--update"] and not more:
        TABLE.write_text(json.dumps(counts(), indent=0) + "\n")
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
