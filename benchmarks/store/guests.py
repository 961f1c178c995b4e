"""Restore of a guest of 1 GiB from a store: lazily, with a working set, a second time, and by QEMU after a download."""

from __future__ import annotations

import ctypes
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.checkpoint.guests import guest, guests
from benchmarks.harness.bench import Setting
from benchmarks.migrate.pageferry_line import PageferryLine
from benchmarks.peers.qemu import QemuLine
from benchmarks.restore.guests import HOT, RATE, period, restore, restore_by_qemu, save_ours, save_theirs
from benchmarks.store.place import Place, store
from pageferry import list_cache
from pageferry.images.image import ImageFile

NAME = "guest"


@dataclass(frozen=True, slots=True)
class _Saved:
    """Guest that was saved by both systems, and its usual writes per second."""

    ours: PageferryLine
    theirs: QemuLine
    image: Path
    usual: float
    usual_theirs: float
    watched: float

    def restored(self, source: str, *options: str, through: tuple[str, ...] = ()) -> dict[str, Any]:
        """Restore with pageferry."""
        return restore(self.ours, source, self.usual, *options, watched=self.watched, through=through)


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Save the guest once with each method, and restore it repeatedly."""
    home, words = guest(setting, RATE, HOT)
    runs = []
    with store(setting) as place, guests(home, words, "to be stored") as (ours, theirs):
        image, mapped, stream = (setting.folder / name for name in ("image", "mapped", "stream"))
        usual, usual_theirs = save_ours(ours, image), save_theirs(theirs, mapped, stream)
        ours.end()
        theirs.end()
        place.push(image, NAME)
        place.upload(mapped, "mapped")
        saved = _Saved(ours, theirs, image, usual, usual_theirs, period(setting))
        for _ in range(setting.repetitions):
            rate = place.link_rate(1 if setting.quick else 3)
            with mock.patch.dict(os.environ, place.environment):
                done = _ours(place, saved) | {"download, then QEMU mapped-ram": _theirs(place, saved)}
            runs += [{"method": method, "iperf3-mbps": rate} | run for method, run in done.items()]
    return runs


def _ours(place: Place, saved: _Saved) -> dict[str, dict[str, Any]]:
    url, through = f"{place.url}/{NAME}", place.client.within
    saved.image.with_name("image.ws").unlink(missing_ok=True)
    done = {"local": saved.restored(str(saved.image))}
    place.clear()
    done["store, no prefetch"] = saved.restored(url, "--no-prefetch", through=through)
    working_set = _working_set(place)
    place.clear()
    done["store"] = saved.restored(url, through=through)
    done["store, second time"] = saved.restored(url, through=through)
    (entry,) = list_cache().images
    _drop_blocks(Path(entry.path))
    shutil.copyfile(working_set, f"{entry.path}.ws")
    done["store, working set"] = saved.restored(url, through=through)
    place.clear()
    done["store, eager"] = saved.restored(url, "--eager", through=through)
    return done


def _theirs(place: Place, saved: _Saved) -> dict[str, Any]:
    copy = place.folder / "copy"
    seconds = place.download("mapped", copy)
    capabilities = ("mapped-ram", "multifd")
    run = restore_by_qemu(saved.theirs, copy, saved.usual_theirs, capabilities, watched=saved.watched)
    copy.unlink()
    keys = ("running-ms", "command-to-resume-ms", "first-tick-ms", "ttr-ms", "complete-ms")
    return run | {key: run[key] + seconds * 1e3 for key in keys if run.get(key) is not None}


def _working_set(place: Place) -> Path:
    """Copy the working set that a restore has recorded. Return the path of the copy."""
    (entry,) = list_cache().images
    copy = place.folder / "working-set"
    shutil.copyfile(f"{entry.path}.ws", copy)
    return copy


def _drop_blocks(image: Path) -> None:
    """Replace the storage blocks of a cached file by holes. The index and the working set stay in the cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    extents = ImageFile(image).image.blocks
    with image.open("r+b") as file:
        for offset, length in extents:
            if libc.fallocate(file.fileno(), 3, offset, length):  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
                raise OSError(ctypes.get_errno(), "cannot punch a hole", str(image))
    (image.parent.parent / "complete.json").unlink(missing_ok=True)
