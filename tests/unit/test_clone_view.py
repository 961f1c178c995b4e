"""Tests of reading the memory of a clone whose image has been moved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pageferry.errors import ImageError
from pageferry.images.metadata import ImageIdentity
from pageferry.pager.base_records import CloneRecord
from pageferry.pager.records import RegionRecord, SegmentRecord
from pageferry.workloads.clone_view import PrivateMemory, open_image


def test_advice_for_a_moved_image_fits_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivateMemory, "_check_mapped", lambda _self: None)
    other = os.memfd_create("other")  # not the base: its pages have to be read from the image
    try:
        region = RegionRecord("ram", 4096, 0, 4096, [SegmentRecord(os.getpid(), 1 << 20, 4096, 0)])
        record = CloneRecord(
            image=str(tmp_path / "moved"),
            identity=ImageIdentity(id="01" * 16, digest="02" * 8),
            pid=os.getpid(),
            regions=[region],
            descriptor=other,
        )
        # `pageferry peek` has no option for another path.
        with pytest.raises(ImageError, match=r"if it was moved, move it back$"):
            PrivateMemory("one", record).read(0, 0, 1)
        with pytest.raises(ImageError, match=r"if it was moved, name it with `parent`$"):
            open_image("one", record)
    finally:
        os.close(other)
