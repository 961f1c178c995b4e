"""Tests of the generation IDs of clones."""

from __future__ import annotations

import pytest

from pageferry.errors import RestoreError
from pageferry.workloads.qemu.generation_id import check_clones


def test_clones_with_one_generation_id_are_refused_with_their_names() -> None:
    with pytest.raises(RestoreError, match="cannot start a and c: both have the generation ID 1"):
        check_clones([("a", "1"), ("b", "2"), ("c", "1")])


def test_clones_with_different_or_without_generation_ids_are_accepted() -> None:
    check_clones([("a", "1"), ("b", None), ("c", "2"), ("d", None)])
