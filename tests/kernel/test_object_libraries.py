"""Objects of libraries in images: which buffers are out of band and loaded on demand, and what is copied.

The tests do not require polars, scipy and scikit-learn, which take 400 MB. `make test-full` installs them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.workloads import handles

ROWS = 400_000
NUMBERS = np.random.default_rng(1).random((ROWS, 2))
TEXTS = [f"text of row {number}" for number in range(ROWS)]


def pandas_numbers() -> tuple[Any, Any]:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": NUMBERS[:, 0], "b": NUMBERS[:, 1], "n": np.arange(ROWS)})
    return frame, lambda found: found["n"].to_numpy()


def pandas_texts() -> tuple[Any, Any]:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"s": pandas.array(TEXTS, dtype=pandas.ArrowDtype(pyarrow.string()))})
    return frame, lambda found: of_arrow(found["s"].array.__arrow_array__())


def arrow_table() -> tuple[Any, Any]:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.table({"n": np.arange(ROWS), "s": TEXTS}), lambda found: of_arrow(found["s"])


def polars_frame() -> tuple[Any, Any]:
    polars = pytest.importorskip("polars")
    pytest.importorskip("pyarrow")
    frame = polars.DataFrame({"n": np.arange(ROWS), "s": TEXTS})
    return frame, lambda found: found["n"].to_numpy(allow_copy=False)


def scipy_matrix(kind: str) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        sparse = pytest.importorskip("scipy.sparse")
        places = np.random.default_rng(1).integers(0, 2000, (2, 2 * ROWS))
        matrix = sparse.coo_matrix((NUMBERS.ravel(), places), shape=(2000, 2000)).tocsr()
        return matrix.asformat(kind), lambda found: found.data

    return make


def nearest_neighbours() -> tuple[Any, Any]:
    neighbors = pytest.importorskip("sklearn.neighbors")
    model = neighbors.KNeighborsRegressor(algorithm="brute").fit(NUMBERS, NUMBERS[:, 0])
    return model, lambda found: found._fit_X


def linear_model() -> tuple[Any, Any]:
    linear = pytest.importorskip("sklearn.linear_model")
    inputs = np.random.default_rng(2).random((20, 200_000))
    model = linear.Ridge().fit(inputs, inputs[:, 0])
    return model, lambda found: found.coef_


def of_arrow(column: Any) -> Any:
    """Return the text of the first chunk of a column as bytes, without copying."""
    chunk = column.chunk(0) if hasattr(column, "chunk") else column
    return np.frombuffer(chunk.buffers()[2], "u1")


def same(found: Any, expected: Any) -> bool:
    """Return whether two objects of the same library are equal."""
    if hasattr(expected, "equals"):
        return bool(found.equals(expected))
    if hasattr(expected, "nnz"):
        return bool((found != expected).nnz == 0)
    inputs = np.zeros((1, expected.n_features_in_))
    return bool(np.array_equal(found.predict(inputs), expected.predict(inputs)))


MAKERS = {
    "pandas, numbers": pandas_numbers,
    "pandas, texts of pyarrow": pandas_texts,
    "pyarrow": arrow_table,
    "polars": polars_frame,
    "scipy, csr": scipy_matrix("csr"),
    "scipy, csc": scipy_matrix("csc"),
    "scipy, coo": scipy_matrix("coo"),
    "scikit-learn, neighbours": nearest_neighbours,
    "scikit-learn, linear model": linear_model,
}


@pytest.fixture(params=list(MAKERS))
def made(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Return an object, and a function that returns an array over one of its buffers without copying."""
    return MAKERS[request.param]()


def test_buffers_are_out_of_band_and_loaded_on_demand(made: tuple[Any, Any], tmp_path: Path) -> None:
    expected, buffer_of = made
    written = pageferry.dump(expected, tmp_path / "image")
    assert written.pickle_bytes < 20_000
    assert written.buffer_bytes > 1_000_000
    found = pageferry.load(tmp_path / "image", prefetch=False)
    array = buffer_of(found)
    arena: Any = handles.containing(int(array.__array_interface__["data"][0]), array.nbytes)
    assert arena is not None, "the buffer was copied"
    assert arena.deferred > arena.length // 2
    assert same(found, expected)


@pytest.mark.usefixtures("root")
def test_processes_can_share_the_buffers(made: tuple[Any, Any], tmp_path: Path) -> None:
    expected, buffer_of = made
    pageferry.dump(expected, tmp_path / "image")
    found = pageferry.load(tmp_path / "image", "c", memory="shared")
    array = buffer_of(found)
    assert handles.containing(int(array.__array_interface__["data"][0]), array.nbytes) is not None
    assert same(found, expected)


def test_python_strings_are_in_the_pickle(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    texts = pandas.DataFrame({"s": np.array(TEXTS, dtype=object)}).astype(object)
    written = pageferry.dump(texts, tmp_path / "texts")
    assert written.pickle_bytes > sum(map(len, TEXTS))
    assert pageferry.load(tmp_path / "texts").equals(texts)


def test_trees_of_scikit_learn_are_buffers_that_are_copied_when_they_are_loaded(tmp_path: Path) -> None:
    ensemble = pytest.importorskip("sklearn.ensemble")
    forest = ensemble.RandomForestRegressor(10, max_depth=12, random_state=1).fit(NUMBERS[:5000], NUMBERS[:5000, 0])
    written = pageferry.dump(forest, tmp_path / "forest")
    assert (written.buffers, written.pickle_bytes < 20_000) == (30, True)
    found = pageferry.load(tmp_path / "forest")
    nodes = found.estimators_[0].tree_.value
    assert handles.containing(int(nodes.__array_interface__["data"][0]), nodes.nbytes) is None
    assert np.array_equal(found.predict(NUMBERS[:100]), forest.predict(NUMBERS[:100]))
