"""Tests of counting free huge pages, and of the conditions for memory compaction."""

from __future__ import annotations

from pathlib import Path

import pytest

from pageferry.host.compaction import compact_memory, free_large_pages

BUDDYINFO = """\
Node 0, zone      DMA      0      0      0      0      0      0      0      0      1      1      3
Node 0, zone   Normal 135665  74051  33513  17048   4897   1388    538    197     90      5      2
Node 1, zone   Normal      1      2      3      4      5      6      7      8      9      0      1
"""
FREE = 1 + 2 * 3 + 5 + 2 * 2 + 2 * 1


@pytest.fixture
def buddyinfo(tmp_path: Path) -> Path:
    path = tmp_path / "buddyinfo"
    path.write_text(BUDDYINFO)
    return path


def test_free_blocks_of_all_zones_and_nodes_are_counted(buddyinfo: Path) -> None:
    assert free_large_pages(buddyinfo) == FREE


def test_buddyinfo_of_the_kernel_is_parsed() -> None:
    assert free_large_pages() >= 0


@pytest.mark.parametrize(("wanted", "asked"), [(0, False), (FREE, False), (FREE + 1, True)])
def test_compaction_is_triggered_if_too_few_pages_are_free(
    buddyinfo: Path, tmp_path: Path, wanted: int, asked: bool
) -> None:
    compact = tmp_path / "compact_memory"
    assert compact_memory(wanted, buddyinfo=buddyinfo, compact=compact) == FREE
    assert compact.exists() == asked


def test_missing_permission_to_compact_is_not_an_error(buddyinfo: Path, tmp_path: Path) -> None:
    assert compact_memory(FREE + 1, buddyinfo=buddyinfo, compact=tmp_path / "missing" / "compact_memory") == FREE


def test_unknown_free_memory_triggers_no_compaction(tmp_path: Path) -> None:
    compact = tmp_path / "compact_memory"
    assert compact_memory(1, buddyinfo=tmp_path / "missing", compact=compact) == 0
    assert not compact.exists()
