"""Tests that a command refuses options that it would ignore."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

import pageferry
from pageferry.checkpoints.clone_options import CloneOptions
from pageferry.checkpoints.restore_options import GuestOptions, RestoredArenaOptions
from pageferry.cli.main import main
from pageferry.cli.parser import Parser, parse
from pageferry.errors import UsageError
from pageferry.large_pages import options as large_pages
from pageferry.migration.options import Options


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("migrate web --switch --mode hybrid", "--mode has no effect with --switch; remove it"),
        ("migrate web host:1 --recover", "ADDRESS has no effect with --recover"),
        ("migrate web --recover --bandwidth 1M --streams 3", "--bandwidth, --streams have no effect with --recover"),
        ("migrate web --take-back --timeout 5s", "--timeout has no effect with --take-back"),
        ("receive web --resume --detach", "--detach has no effect with --resume"),
        ("receive web --workload demo --hugetlb", "--hugetlb has no effect with --workload demo"),
        ("receive web --max-size 1G -- qemu-system-x86_64", "--max-size has no effect with a QEMU command line"),
        ("restore web --takeover --eager", "--eager has no effect with --takeover"),
        ("restore web --takeover -- qemu-system-x86_64", "the command after -- has no effect with --takeover"),
        ("large-pages web --undo --window 1s", "--window has no effect with --undo"),
        ("large-pages web --undo --watch --reclaim swap", "--reclaim, --watch have no effect with --undo"),
        ("sharing web --undo --every 2", "--every has no effect with --undo"),
        ("sharing web --break-hot", "--break-hot has no effect without --apply"),
        ("sharing web --interval 5s", "--interval has no effect without --watch"),
        ("top --once --interval 5s", "--interval has no effect with --once"),
        ("logs web --remove --lines 3", "--lines has no effect with --remove"),
        ("list --bases --all", "--all has no effect with --bases"),
    ],
)
def test_option_that_a_mode_ignores_is_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--disks shared", "--copy-disks", "--tls .", "--tls-hostname a", "--insecure"])
def test_demo_has_no_options_that_it_would_ignore(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *option.split()]) == 2
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"disks": "shared"}, {"copy_disks": True}])
def test_arena_has_no_disks_to_migrate(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"`{next(iter(option))}` has no effect for .*: only guests have disks"):
        pageferry.migrate(pageferry.Arena(4096), "unix:/nowhere", **option)


@pytest.mark.parametrize("option", [{"max_rounds": 3}, {"trace_granularity": "4K"}])
def test_postcopy_has_no_options_of_rounds(option: dict[str, Any]) -> None:
    Options(**option, mode="hybrid")
    with pytest.raises(UsageError, match=f"`{next(iter(option))}` has no effect with `mode` postcopy"):
        Options(**option, mode="postcopy")


@pytest.mark.parametrize("kind", [GuestOptions, RestoredArenaOptions, CloneOptions])
def test_eager_loading_requires_background_loading(kind: type) -> None:
    count = {"count": 1} if kind is CloneOptions else {}
    with pytest.raises(UsageError, match="`eager` requires background loading"):
        kind(eager=True, prefetch=False, **count)


def test_options_of_compression_require_compression() -> None:
    with pytest.raises(UsageError, match="`adaptive` requires a `codec`"):
        Options(adaptive=True)
    with pytest.raises(UsageError, match="`codec` zstd requires `reclaim` store"):
        large_pages.Options(codec="zstd", reclaim="swap")


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("migrate web", {"name"}),
        ("migrate web unix:/a --metrics 127.0.0.1:1 --log file --output json", {"name", "address"}),
        ("sharing web --watch --interval 60", {"names", "watch"}),  # the default, in another form
        ("large-pages web --threshold 3 --rounds 5", {"target", "threshold"}),
        ("checkpoint web image --no-track", {"name", "image", "track"}),
        ("disks commit web --force", {"name", "force"}),
    ],
)
def test_given_arguments_differ_from_their_defaults(line: str, given: set[str]) -> None:
    args: argparse.Namespace = parse(line.split())
    parser: Parser = args.usage_error.__self__
    assert set(parser.given(args)) == given
