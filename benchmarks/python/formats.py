"""Formats in which an array is saved and loaded: that of pageferry, and those of the installed peers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

import pageferry


@dataclass(frozen=True, slots=True)
class Format:
    """Way to save an array, and to load it so that contents are read on access."""

    needs: str
    """Package that must be installed."""
    save: Callable[[Any, str], object]
    load: Callable[[str], Any]


def synced(save: Callable[[Any, str], object]) -> Callable[[Any, str], object]:
    """Return a function that saves an array and syncs the file, as `pageferry.dump` does."""

    def call(array: Any, path: str) -> None:
        save(array, path)
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    return call


def _save_numpy(array: Any, path: str) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def _save_joblib(array: Any, path: str) -> None:
    import joblib

    joblib.dump(array, path)


def _load_joblib(path: str) -> Any:
    import joblib

    return joblib.load(path, mmap_mode="r")


def _save_safetensors(array: Any, path: str) -> None:
    from safetensors.numpy import save_file

    save_file({"array": array}, path)


def _load_safetensors(path: str) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="numpy").__enter__().get_slice("array")


def _save_pyarrow(array: Any, path: str) -> None:
    import pyarrow

    table = pyarrow.table({"array": array})
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _load_pyarrow(path: str) -> Any:
    import pyarrow

    table = pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()
    return table["array"].chunk(0).to_numpy(zero_copy_only=True)


FORMATS: Mapping[str, Format] = {
    "pageferry": Format("pageferry", pageferry.dump, pageferry.load),
    "numpy": Format("numpy", synced(_save_numpy), lambda path: np.load(path, mmap_mode="r")),
    "joblib": Format("joblib", synced(_save_joblib), _load_joblib),
    "safetensors": Format("safetensors", synced(_save_safetensors), _load_safetensors),
    "pyarrow": Format("pyarrow", synced(_save_pyarrow), _load_pyarrow),
}


def installed() -> list[str]:
    """Return the names of the formats whose package is installed, pageferry first."""
    return [name for name, one in FORMATS.items() if find_spec(one.needs) is not None]
