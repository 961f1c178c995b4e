"""Test that the functions of the engine release the GIL, except those that only read or store a few fields."""

from __future__ import annotations

import re
from pathlib import Path

BINDINGS = Path(__file__).parents[2] / "crates/bindings/src"

RELEASES = re.compile(r"py\.detach\(|self\.made\(|self\.kept_userfault\(|interruptible\(|on_sets\(|self\.with\(py,")
"""Release of the GIL, by the function itself or by a helper."""

KEEPS = {
    "base": "file_length counters prefetched bytes_read failures",
    "file_systems": "file_system_type",
    "image": "fileno id digest regions pages length page_block block_count blocks new",
    "ledger": "new options pages filled stalls page_offset",
    "mappers": "own_mappings",
    "mapping": "new grow keep address length __len__ fileno __getbuffer__ end_on_truncation",
    "pager": "flags_length finished counters histogram touched failures large evicted",
    "pages": "new full pages __len__ __bool__ __contains__ insert remove clear update subtract unit_counts runs copy",
    "peer": "cancel progress uncompressed requests remaining lost new ended",
    "placer": "new fallbacks populated",
    "probing": "userfaultfd",
    "saver": "new counters",
    "sharing": "new remaining scale units totals",
    "space": "pid descriptor new",
    "wire": "new pages __repr__ progress uncompressed cancel sent received ended failure",
}
"""Functions of each module that keep the GIL: they read or store fields, or make one short system call. Constructors
that release it in one class of a module may keep it in another one."""


def functions(source: str) -> dict[str, list[str]]:
    """Return the bodies of the functions that Python can call, by name."""
    found: dict[str, list[str]] = {}
    blocks = re.findall(r"^#\[pymethods\]\nimpl[^\n]*\{\n(.*?)^\}", source, re.M | re.S)
    methods = [
        one for block in blocks for one in re.findall(r"^    (?:unsafe )?fn (\w+)(.*?)^    \}", block, re.M | re.S)
    ]
    plain = re.findall(r"^#\[pyfunction\]\n(?:#\[[^\n]*\n)*pub fn (\w+)(.*?)^\}", source, re.M | re.S)
    for name, body in [*methods, *plain]:
        found.setdefault(name, []).append(body)
    return found


def test_only_short_functions_keep_the_gil() -> None:
    keeping = {}
    for file in sorted(BINDINGS.glob("*.rs")):
        names = {name for name, bodies in functions(file.read_text()).items() if not all(map(RELEASES.search, bodies))}
        if names:
            keeping[file.stem] = names
    assert keeping == {module: set(names.split()) for module, names in KEEPS.items()}


def test_functions_of_the_bindings_are_found() -> None:
    found = functions((BINDINGS / "saver.rs").read_text())
    assert {"begin", "finish", "close", "wait"} <= set(found)
    assert all(RELEASES.search(body) for body in found["finish"])
    assert "free_zeros" in functions((BINDINGS / "sharing.rs").read_text())
