"""Tests of the public names of the package, and of their documentation."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
from types import ModuleType
from typing import Any

import pytest

import pageferry
from pageferry import fleet, large_pages, sharing
from pageferry.checkpoints import clone_options, restore_options
from pageferry.checkpoints import options as checkpoints
from pageferry.control import options as control
from pageferry.fleet import options as fleet_options
from pageferry.migration import options as migration
from pageferry.migration import receiving
from pageferry.pager.firecracker import options as firecracker
from pageferry.sharing import options as sharing_options
from pageferry.stores import options as stores
from pageferry.workloads.arena import options as arenas

PARTS = (pageferry, fleet, large_pages, sharing)


@pytest.mark.parametrize("part", PARTS)
def test_every_public_name_exists_and_is_documented(part: ModuleType) -> None:
    for name in part.__all__:
        assert name in dir(part)
        assert name in ("Decision", "Listener") or inspect.getdoc(getattr(part, name)), name


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
        (pageferry.clone, clone_options.CloneOptions),
        (pageferry.restore_guest, restore_options.GuestOptions),
        (fleet.clone, fleet_options.CloneOptions),
        (fleet.evacuate, fleet_options.EvacuateOptions),
        (fleet.move, fleet_options.MoveOptions),
        (fleet.run, fleet_options.RunOptions),
    ],
)
def test_docstrings_name_all_options(function: object, options: Any) -> None:
    text = inspect.getdoc(function) or ""
    assert [field.name for field in dataclasses.fields(options) if field.name not in text] == []


def test_submodules_are_imported_lazily() -> None:
    program = "import sys, pageferry; pageferry.errors; print(*(name for name in sys.modules if 'migration' in name))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("arguments", "options", "others"),
    [
        (pageferry.AdoptArguments, control.AdoptOptions, set()),
        (pageferry.ArenaArguments, arenas.ArenaOptions, {"name"}),
        (pageferry.CheckpointArguments, checkpoints.Options, set()),
        (pageferry.CloneArguments, clone_options.CloneOptions, set()),
        (pageferry.CollectArguments, stores.CollectOptions, set()),
        (pageferry.CommitArguments, control.CommitOptions, set()),
        (pageferry.GuestArguments, restore_options.GuestOptions, {"detach"}),
        (pageferry.LogArguments, control.LogOptions, set()),
        (pageferry.MigrationArguments, migration.Options, set()),
        (pageferry.PushArguments, stores.PushOptions, set()),
        (pageferry.ReceiveArguments, receiving.ReceiveOptions, set()),
        (pageferry.RecoverArguments, migration.RecoverOptions, set()),
        (pageferry.RestoreArguments, restore_options.RestoredArenaOptions, {"name", "memory"}),
        (pageferry.ServeArguments, firecracker.ServeOptions, set()),
        (pageferry.ShutdownArguments, control.ShutdownOptions, set()),
        (fleet.CheckpointArguments, fleet_options.CheckpointOptions, set()),
        (fleet.CloneArguments, fleet_options.CloneOptions, set()),
        (fleet.ClusterArguments, fleet_options.ClusterOptions, set()),
        (fleet.EvacuateArguments, fleet_options.EvacuateOptions, set()),
        (fleet.MovableArguments, fleet_options.MovableOptions, set()),
        (fleet.MoveArguments, fleet_options.MoveOptions, set()),
        (fleet.RebalanceArguments, fleet_options.RebalanceOptions, set()),
        (fleet.RunArguments, fleet_options.RunOptions, set()),
        (sharing_options.SelectionArguments, sharing_options.Selection, set()),
    ],
)
def test_types_of_keyword_arguments_have_the_fields_of_the_options(
    arguments: Any, options: Any, others: set[str]
) -> None:
    """`others`: fields that are parameters of their own, or cannot be chosen."""
    known = {field.name for field in dataclasses.fields(options)}
    assert arguments.__required_keys__ | arguments.__optional_keys__ == known - others


def public_functions() -> list[Any]:
    return [
        pytest.param(function, id=f"{part.__name__}.{name}")
        for part in PARTS
        for name in part.__all__
        if inspect.isfunction(function := getattr(part, name))
    ]


def classes_of(annotation: object) -> set[type]:
    """Return the classes of pageferry in an annotation of a result."""
    found = set().union(*map(classes_of, typing.get_args(annotation)))
    if inspect.isclass(annotation) and annotation.__module__.startswith("pageferry."):
        found.add(annotation)
    return found


@pytest.mark.parametrize("function", public_functions())
def test_classes_of_results_are_public(function: Any) -> None:
    annotation = inspect.unwrap(function).__annotations__["return"]
    module = sys.modules[inspect.unwrap(function).__module__]
    lazy = {name: getattr(pageferry, name) for name in pageferry.__all__}
    result = eval(annotation, {**lazy, **vars(module)})
    public = {getattr(part, name) for part in PARTS for name in part.__all__ if inspect.isclass(getattr(part, name))}
    assert classes_of(result) <= public


@pytest.mark.parametrize("function", public_functions())
def test_options_of_public_functions_are_typed(function: Any) -> None:
    annotations = inspect.unwrap(function).__annotations__
    keywords = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.VAR_KEYWORD
    ]
    assert all(annotations[name].startswith("Unpack[") for name in keywords)
