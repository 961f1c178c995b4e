"""The table of the guide for Python programs states what each kind of user can do, and by which methods."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import users
from tests.kernel.images import Maker
from tests.kernel.test_users import SWITCH, device, folder

pytestmark = pytest.mark.usefixtures("root")

GUIDE = users.ROOT / "docs/guide/python.md"
__all__ = ["device", "folder"]


def table() -> dict[str, dict[str, str]]:
    """Return the rows of the table by the kind of user."""
    section = GUIDE.read_text().partition("\n## Users and containers\n")[2].partition("\n## ")[0]
    heads, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.M)
    ]
    return {name: dict(zip(heads[1:], cells, strict=True)) for name, *cells in rows}


def found(kind: str, folder: Path) -> dict[str, str]:
    """Return what a program of a kind of user can do."""
    image = Maker(2048).write(folder / "image")
    image.chmod(0o644)
    done = users.run(kind, folder, "-m", "tests.kernel.rights_user", str(image), str(folder))
    assert done.returncode == 0, done.stderr
    methods: dict[str, str] = json.loads(done.stdout)
    return methods


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("root", "root"),
        ("ordinary user", "user"),
        ("root in a container", "sandbox"),
        ("root in a container, without capabilities", "bare"),
    ],
)
def test_row_of_a_user(name: str, kind: str, folder: Path) -> None:
    assert found(kind, folder) == table()[name]


def test_row_of_a_user_with_the_device(folder: Path, device: None) -> None:
    assert found("user", folder) == table()["ordinary user with /dev/userfaultfd"]


@pytest.fixture
def any_folder() -> Iterator[Path]:
    """Yield a folder that every user may write to."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o777)
        yield Path(made)


def test_row_of_a_user_who_may_handle_faults(any_folder: Path, kernel_faults: None) -> None:
    assert SWITCH.read_text().strip() == "1"
    assert found("user", any_folder) == table()["ordinary user, vm.unprivileged_userfaultfd=1"]


def test_every_row_has_a_test() -> None:
    assert len(table()) == 6
