"""Data frame with strings: saved and loaded by pageferry and by peers that are installed.

`python -m benchmarks.python.frames FORMAT PATH` loads a frame and prints the durations as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import pageferry
from benchmarks.harness.bench import Setting
from benchmarks.python.formats import Format, synced

FULL, SMALL = 10_000_000, 20_000
"""Number of rows."""


def frame_of(rows: int) -> Any:
    """Return a data frame with a column of numbers, and a column of strings in memory of pyarrow."""
    import pandas
    import pyarrow

    texts = pyarrow.array([f"row {number} of a table" for number in range(rows)])
    column = pandas.Series(pandas.array(texts, dtype=pandas.ArrowDtype(pyarrow.string())))
    return pandas.DataFrame({"number": np.arange(rows), "text": column})


def _save_pickle(frame: Any, path: str) -> None:
    frame.to_pickle(path, compression=None)


def _load_pickle(path: str) -> Any:
    import pandas

    return pandas.read_pickle(path, compression=None)


def _save_joblib(frame: Any, path: str) -> None:
    import joblib

    joblib.dump(frame, path)


def _load_joblib(path: str) -> Any:
    import joblib

    return joblib.load(path, mmap_mode="r")


def _save_pyarrow(frame: Any, path: str) -> None:
    import pyarrow

    table = pyarrow.Table.from_pandas(frame)
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _load_pyarrow(path: str) -> Any:
    import pandas
    import pyarrow

    table = pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()
    return table.to_pandas(types_mapper=pandas.ArrowDtype)


FORMATS: Mapping[str, Format] = {
    "pageferry": Format("pageferry", pageferry.dump, pageferry.load),
    "pandas pickle": Format("pandas", synced(_save_pickle), _load_pickle),
    "joblib": Format("joblib", synced(_save_joblib), _load_joblib),
    "pyarrow": Format("pyarrow", synced(_save_pyarrow), _load_pyarrow),
}


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Save and load a frame in each format; nothing without pandas and pyarrow."""
    if find_spec("pandas") is None or find_spec("pyarrow") is None:
        return []
    frame, runs = frame_of(SMALL if setting.quick else FULL), []
    path = setting.folder / "frame"
    for _ in range(setting.repetitions):
        for name, one in FORMATS.items():
            if find_spec(one.needs) is None:
                continue
            run: dict[str, Any] = {"format": name, "save-ms": timed(partial(one.save, frame, str(path)))}
            runs.append(run | {"file": path.stat().st_size} | loaded(name, path))
    return runs


def timed(call: Callable[[], object]) -> float:
    """Return the duration of a call, milliseconds."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def loaded(name: str, path: Path) -> dict[str, float]:
    """Load the frame in a new process, with a cold page cache. Return the durations."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
    command = [sys.executable, "-m", "benchmarks.python.frames", name, str(path)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def main(name: str, path: str) -> None:
    """Load a frame, read a row, and read all strings."""
    import pandas  # noqa: F401  # not a part of the duration
    import pyarrow  # noqa: F401

    began = time.perf_counter()
    frame = FORMATS[name].load(path)
    frame.iloc[0]
    first = (time.perf_counter() - began) * 1e3
    print(
        json.dumps({"first-ms": first, "pass-ms": timed(lambda: frame["text"].str.len().sum() + frame["number"].sum())})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
