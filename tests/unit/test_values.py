"""Tests of argument validation: public functions check their arguments first, by the same rules as the command line."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pageferry
from pageferry import large_pages, sharing
from pageferry.checkpoints.options import Options as CheckpointOptions
from pageferry.checkpoints.restore_options import RestoredArenaOptions
from pageferry.cli.main import main
from pageferry.cli.options import given
from pageferry.cli.parser import parse
from pageferry.cli.syntax.guests import GuestOptions
from pageferry.cli.syntax.receive import ReceiveOptions
from pageferry.cli.syntax.restore import RestoreOptions
from pageferry.control.options import LogOptions, ShutdownOptions
from pageferry.demo.options import DemoOptions
from pageferry.docstrings import field_docstrings
from pageferry.errors import MigrationError, PageferryError, UsageError, WorkloadError
from pageferry.migration.options import Options as MigrationOptions
from pageferry.options import options_of
from pageferry.stores.options import CollectOptions, PushOptions
from pageferry.workloads.arena.options import ArenaOptions

WRONG: list[Any] = [
    object(),
    b"x",
    "no such word",
    "\0",
    "",
    math.nan,
    math.inf,
    -math.inf,
    -1,
    True,
    1 << 80,
    1e300,
    "-5ms",
    "nan",
    "1e9",
    [],
    {"a": 1},
    3 + 4j,
    "٣",  # a digit that is not ASCII
]
"""Values that are invalid for most parameters."""


def _path(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


OPTIONS: dict[str, Any] = {
    "arena": ArenaOptions,
    "restored arena": RestoredArenaOptions,
    "migration": MigrationOptions,
    "checkpoint": CheckpointOptions,
    "large_pages": large_pages.Options,
    "sharing": sharing.Options,
    "shutdown": ShutdownOptions,
    "logs": LogOptions,
    "push": PushOptions,
    "collection": CollectOptions,
}
PATHS = ("tls", "store", "tls_hostname", "key", "key_command")
FLAGS = (
    "auto_converge",
    "adaptive",
    "insecure",
    "track",
    "direct_io",
    "eager",
    "prefetch",
    "force",
    "copy_disks",
    "reupload",
)


def _name(wrong: object) -> str:
    """Return a test id that is the same in every process, unlike the address of an object."""
    return "object" if type(wrong) is object else repr(wrong)


@pytest.mark.parametrize("wrong", WRONG, ids=_name)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, cls in OPTIONS.items() for name in _fields(cls)])
def test_wrong_option_is_a_usage_error(kind: str, name: str, wrong: Any) -> None:
    if name in PATHS and _path(wrong) and name != "store":
        pytest.skip("any string is a valid path or name")
    if name in FLAGS and wrong is True:
        pytest.skip("True is a valid value of a flag")
    with pytest.raises(UsageError):
        OPTIONS[kind](**{name: wrong})


@pytest.mark.parametrize("kind", OPTIONS)
def test_unknown_option_is_named(kind: str, tmp_path: Path) -> None:
    arena = pageferry.Arena(4096)
    calls: dict[str, Callable[[], Any]] = {
        "migration": lambda: pageferry.migrate_async(arena, "127.0.0.1:1", mod="hybrid"),  # type: ignore[call-arg]
        "checkpoint": lambda: pageferry.checkpoint_async(arena, tmp_path / "image", mod="stop"),  # type: ignore[call-arg]
    }
    if kind not in calls:
        pytest.skip("these options form a class")
    with pytest.raises(UsageError, match=r"mod`.*did you mean 'mode'") as error:
        asyncio.run(calls[kind]())
    assert isinstance(error.value, TypeError)
    assert list(tmp_path.iterdir()) == []


def _call(function: Any, given: dict[str, Any]) -> None:
    result = function(**given)
    if inspect.isawaitable(result):
        asyncio.run(_awaited(result))


async def _awaited(result: Any) -> Any:
    return await asyncio.wait_for(result, 20)


def _arguments(path: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return calls of public functions that fail with a named error, quickly and without side effects."""
    arena = pageferry.Arena(4096)
    return {
        "Arena": (pageferry.Arena, {"size": -1}),
        "migrate": (pageferry.migrate, {"workload": arena, "address": "127.0.0.1:1"}),
        "receive": (pageferry.receive, {"address": "127.0.0.1:-1"}),
        "recover": (pageferry.recover, {"workload": arena}),
        "take_back": (pageferry.take_back, {"workload": arena}),
        "checkpoint": (pageferry.checkpoint, {"workload": arena, "path": path / "none" / "image"}),
        "restore": (pageferry.restore, {"path": path / "none"}),
        "pause": (pageferry.pause, {"name": "no-such-workload"}),
        "resume": (pageferry.resume, {"name": "no-such-workload"}),
        "shutdown": (pageferry.shutdown, {"name": "no-such-workload"}),
        "console": (pageferry.console, {"name": "no-such-workload"}),
        "monitor": (pageferry.monitor, {"name": "no-such-workload", "command": "info status"}),
        "qmp": (pageferry.qmp, {"name": "no-such-workload", "command": "query-status"}),
        "logs": (pageferry.logs, {"name": "no-such-workload"}),
        "stop": (pageferry.stop, {"name": "no-such-workload"}),
        "commit_disks": (pageferry.commit_disks, {"name": "no-such-workload"}),
        "delete_image": (pageferry.delete_image, {"path": path / "none"}),
        "adopt": (pageferry.adopt, {"name": "adopted", "qmp": str(path / "none")}),
        "attach": (pageferry.attach, {"name": "no-such-workload"}),
        "arena_of": (pageferry.arena_of, {"obj": None}),
        "Arrays": (pageferry.Arrays, {"size": -1}),
        "clone": (pageferry.clone, {"path": path / "none", "arguments": ["qemu-system-x86_64"], "count": 1}),
        "run_guest": (pageferry.run_guest, {"name": "guest", "arguments": []}),
        "checkpoint_guest": (pageferry.checkpoint_guest, {"name": "no-such-workload", "path": path / "image"}),
        "restore_guest": (pageferry.restore_guest, {"name": "guest", "path": path / "none", "arguments": []}),
        "push_image": (pageferry.push_image, {"path": path / "none", "url": "file:///none/image"}),
        "pull_image": (pageferry.pull_image, {"url": "file:///none/image", "path": path / "image"}),
        "copy_image": (pageferry.copy_image, {"path": path / "none", "target": "file:///none/image"}),
        "check_store": (pageferry.check_store, {"url": "none"}),
        "list_images": (pageferry.list_images, {"url": "file:///none"}),
        "collect_garbage": (pageferry.collect_garbage, {"url": "file:///none"}),
        "list_cache": (pageferry.list_cache, {}),
        "clear_cache": (pageferry.clear_cache, {}),
        "image_info": (pageferry.image_info, {"path": path / "none"}),
        "verify_image": (pageferry.verify_image, {"path": path / "none"}),
        "compare_images": (pageferry.compare_images, {"path": path / "none", "other": path / "none"}),
        "flatten_image": (pageferry.flatten_image, {"path": path / "none", "target": path / "flat"}),
        "import_image": (
            pageferry.import_image,
            {"target": path / "image", "firecracker": path / "none", "vmstate": path / "none"},
        ),
        "export_image": (
            pageferry.export_image,
            {"path": path / "none", "firecracker": path / "memory", "vmstate": path / "state"},
        ),
        "checkpoint_cloud_hypervisor": (
            pageferry.checkpoint_cloud_hypervisor,
            {"api_socket": path / "none", "path": path / "image"},
        ),
        "serve": (pageferry.serve, {"image": path / "none", "firecracker": path / "socket"}),
        "dump": (pageferry.dump, {"obj": 1, "target": path / "none" / "image"}),
        "load": (pageferry.load, {"source": path / "none"}),
        "open_buffers": (pageferry.open_buffers, {"source": path / "none"}),
        "open_target": (large_pages.open_target, {"text": "no-such-workload"}),
        "process_target": (large_pages.process_target, {"pid": (1 << 22) + 1}),
        "workload_target": (large_pages.workload_target, {"workload": None}),
        "sample": (large_pages.sample, {"target": None}),
        "large_pages.undo": (large_pages.undo, {"target": None}),
        "Threshold": (large_pages.Threshold, {"activity": -1}),
        "find": (sharing.find, {"names": ["no-such-workload"]}),
        "share": (sharing.share, {"names": ["no-such-workload"]}),
        "sharing.undo": (sharing.undo, {"names": ["no-such-workload"]}),
    }


@pytest.mark.parametrize("wrong", WRONG, ids=_name)
@pytest.mark.parametrize("name", list(_arguments(Path("/"))))
def test_wrong_argument_ends_in_an_error_of_the_package(name: str, wrong: Any, tmp_path: Path) -> None:
    """Pass the invalid value as each parameter of the signature in turn, so that new parameters are covered."""
    function, base = _arguments(tmp_path)[name]
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name in ("path", "target") and _path(wrong):
            continue
        with pytest.raises(PageferryError):
            _call(function, base | {parameter.name: wrong})
    assert list(tmp_path.iterdir()) == []


def test_every_public_function_is_tested() -> None:
    public = {name for name in pageferry.__all__ if inspect.isfunction(getattr(pageferry, name))} | {"Arena", "Arrays"}
    public |= {name for name in large_pages.__all__ if inspect.isfunction(getattr(large_pages, name))} - {"undo"}
    public |= {name for name in sharing.__all__ if inspect.isfunction(getattr(sharing, name))} - {"undo"}
    # The synchronous and the `_async` form of a function share their code (see test_synchronous).
    assert {name.removesuffix("_async") for name in public} - {"undo"} <= set(_arguments(Path("/")))


@pytest.mark.parametrize("mode", ["Lazy", "stopp", None, 1])
def test_checkpoint_with_unknown_mode_saves_nothing(mode: Any, tmp_path: Path) -> None:
    paused: list[str] = []
    arena = pageferry.Arena(1 << 20, on_pause=lambda: paused.append("paused"))
    with pytest.raises(UsageError, match="mode"):
        pageferry.checkpoint(arena, tmp_path / "image", mode=mode)
    assert paused == []
    assert list(tmp_path.iterdir()) == []


# -- values in Python and on the command line


def _option(verb: str, option: str, text: str) -> Any:
    """Return the value of an option as the command line parses it."""
    args = parse([verb, "x", "y", option, text])
    return getattr(args, option.removeprefix("--").replace("-", "_"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("30ms", 0.03), ("10s", 10), ("1m", 60), ("1min", 60), ("0.5 h", 1800), ("200us", 2e-4)]
)
def test_durations_are_the_same_in_python_and_on_the_command_line(text: str, seconds: float) -> None:
    assert MigrationOptions(max_downtime=text).max_downtime == pytest.approx(seconds)  # type: ignore[arg-type]
    for option in ("--max-downtime", "--timeout"):
        assert _option("migrate", option, text) == pytest.approx(seconds)


def test_number_alone_has_the_documented_unit() -> None:
    assert MigrationOptions(max_downtime=0.3).max_downtime == _option("migrate", "--max-downtime", "300") == 0.3
    assert MigrationOptions(timeout=10).timeout == _option("migrate", "--timeout", "10") == 10


def test_sizes_and_rates_are_the_same_in_python_and_on_the_command_line() -> None:
    rate = MigrationOptions(bandwidth="100M/s").bandwidth  # type: ignore[arg-type]
    assert rate == _option("migrate", "--bandwidth", "100M") == 100 << 20
    assert MigrationOptions(bandwidth=1e9).bandwidth == 10**9  # type: ignore[arg-type]
    size = CheckpointOptions(staging="32MiB").staging  # type: ignore[arg-type]
    assert size == _option("checkpoint", "--staging", "32M") == 32 << 20
    assert large_pages.Options(sample="5%", window="100ms").window == 0.1  # type: ignore[arg-type]
    assert len(pageferry.Arena("1M")) == 1 << 20


# -- options of the verbs


VERB_OPTIONS: dict[str, type] = {
    "migrate": MigrationOptions,
    "checkpoint": CheckpointOptions,
    "large-pages": large_pages.Options,
    "sharing": sharing.Options,
    "receive": ReceiveOptions,
    "restore": RestoreOptions,
    "run": GuestOptions,
    "demo": DemoOptions,
    "shutdown": ShutdownOptions,
    "logs": LogOptions,
}


@pytest.mark.parametrize("verb", VERB_OPTIONS)
def test_every_field_is_an_option_with_default_and_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = VERB_OPTIONS[verb]
    assert main([verb, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    args = parse(
        [verb, *([] if verb == "demo" else ["x", "y"][: 2 if verb in ("migrate", "checkpoint", "restore") else 1])]
    )
    for option in options_of(kind):
        flag = "--" + option.name.replace("_", "-")
        assert (flag in text) == (not option.api_only), flag
        assert field_docstrings(kind)[option.name], flag
    assert kind(**given(args, kind)) == kind()


# -- errors on the command line


def _said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == UsageError.exit_code
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["migrat", "web", "h:1"], "did you mean 'migrate'?"),
        (["checkpiont", "web", "x"], "did you mean 'checkpoint'?"),
        (["migrate", "web", "h:1", "--max-downtimes", "3"], "did you mean '--max-downtime'?"),
        (["migrate", "web", "h:1", "--mode", "postcoppy"], "did you mean 'postcopy'?"),
        (["run", "web", "qemu-system-x86_64", "-m", "1G"], "missing -- before qemu-system-x86_64"),
        (["restore", "web", "x.img", "/usr/bin/qemu-system-x86_64"], "missing -- before /usr/bin/qemu-system"),
        (["receive", "web", "qemu-system-x86_64", "-m", "1G"], "missing --"),
    ],
)
def test_mistyped_command_gets_a_hint(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in _said(words, capsys)


@pytest.mark.parametrize(
    "words",
    [
        ["migrate", "none", "127.0.0.1:1", "--max-downtime", "30ms", "--timeout", "10s", "--bandwidth", "1G/s"],
        ["large-pages", "none", "--window", "300ms"],
        ["sharing", "none", "--watch", "--interval", "1m"],
    ],
)
def test_units_are_accepted_on_the_command_line(words: list[str]) -> None:
    assert main(words) == 11  # no such workload


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["migrate", "none", "127.0.0.1:1", "--streams", "99"], "--streams"),
        (["migrate", "none", "127.0.0.1:1", "--max-downtime", "2h"], "--max-downtime"),
        (["migrate", "none", "127.0.0.1:1", "--tls-hostname", "x"], "--tls-hostname requires --tls"),
        (["checkpoint", "none", "image", "--trap-block", "5K"], "--trap-block"),
        (["receive", "none", "--workload", "demo", "--timeout", "0"], "--timeout"),
        (["receive", "none", "--workload", "demo", "--allow", "x"], "--allow requires --tls"),
        (["large-pages", "none", "--window", "300"], "--window"),
        (["sharing", "none", "--every", "0"], "--every"),
    ],
)
def test_option_out_of_range_is_named_as_given(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command checks the option before it looks up the workload: no workload with this name exists."""
    assert named in _said(words, capsys)


def test_errors_in_python_name_no_options(tmp_path: Path) -> None:
    for call in (
        lambda: MigrationOptions(tls_hostname="x"),
        lambda: MigrationOptions(max_downtime=-1),
        lambda: large_pages.Options(store=tmp_path),
        lambda: pageferry.receive("127.0.0.1:0", allow=["x"]),
        lambda: pageferry.migrate(pageferry.Arena(4096), "192.0.2.1:1"),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert " --" not in str(error.value)


def test_error_classes_distinguish_failures() -> None:
    assert not issubclass(WorkloadError, MigrationError)
    assert issubclass(WorkloadError, PageferryError)
    assert "the party that failed, not the operation" in (pageferry.errors.__doc__ or "")


def test_restore_refuses_contradictory_run_states(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(["restore", "web", "web.img", "--paused", "--resume", "--", "qemu-system-x86_64"], capsys)
    assert "--paused cannot be combined with --resume" in said
