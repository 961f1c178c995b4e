"""Tests of the public names of the package, and of their documentation."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import pageferry
from pageferry import large_pages, sharing
from pageferry.checkpoints import options as checkpoints
from pageferry.checkpoints import restore_options
from pageferry.control import options as control
from pageferry.migration import options as migration
from pageferry.migration import receiving

PARTS = (pageferry, large_pages, sharing)


@pytest.mark.parametrize("part", PARTS)
def test_every_public_name_exists_and_is_documented(part: ModuleType) -> None:
    for name in part.__all__:
        assert name in dir(part)
        assert name == "Decision" or inspect.getdoc(getattr(part, name)), name


@pytest.mark.parametrize("part", PARTS)
def test_other_names_are_refused(part: ModuleType) -> None:
    with pytest.raises(AttributeError, match="nothing"):
        part.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (pageferry.migrate, migration.Options),
        (pageferry.recover, migration.RecoverOptions),
        (pageferry.receive, receiving.ReceiveOptions),
        (pageferry.checkpoint, checkpoints.Options),
        (pageferry.shutdown, control.ShutdownOptions),
        (pageferry.restore, restore_options.RestoredArenaOptions),
    ],
)
def test_docstrings_name_all_options(function: object, options: Any) -> None:
    text = inspect.getdoc(function) or ""
    assert [field.name for field in dataclasses.fields(options) if field.name not in text] == []


def test_submodules_are_imported_lazily() -> None:
    program = "import sys, pageferry; pageferry.errors; print(*(name for name in sys.modules if 'migration' in name))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
