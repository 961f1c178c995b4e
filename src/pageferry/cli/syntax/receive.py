"""Arguments of `pageferry receive`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated, Literal

from pageferry.cli.options import add_options
from pageferry.cli.syntax.guests import GuestOptions
from pageferry.errors import UsageError
from pageferry.migration.options import TIMEOUT, MoveMemory, Options
from pageferry.options import Size, Text, Texts, check
from pageferry.workloads.arena.limits import MAX_ARENA

TAKES_COMMAND = True
WORKS_ON = "name"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveOptions(GuestOptions):
    """Options of the verb. Raises UsageError."""

    listen: Annotated[
        str | None,
        Text(metavar="ADDRESS", unset="a Unix socket in the run directory; with --tls or --insecure 127.0.0.1:0"),
    ] = None
    """Listen on unix:PATH, for sources on this host, or on HOST:PORT, where port 0 selects a free port."""
    resume: bool = False
    """Receive the remaining memory of a guest that this host owns; then run `pageferry migrate --recover` at its
    source."""
    workload: Literal["demo"] | None = None
    """Receive the built-in workload instead of a QEMU guest."""
    max_size: Annotated[int | None, Size(1, MAX_ARENA, unset="the available memory")] = None
    """Maximum size of the memory to accept."""
    memory: MoveMemory = "auto"
    """Memory of a guest that shares the memory of an image at its source: share it if this host has that image
    (`auto`), require this (`shared`), or receive all pages (`own`); see docs/clones.md."""
    base: Annotated[tuple[str, ...], Texts(metavar="PATH", unset="images whose memory guests of this user share")] = ()
    """Image whose memory such a guest may share, or a directory of images; can be repeated."""
    timeout: Annotated[float, TIMEOUT] = Options().timeout
    """Fail when the peer has been silent for this time, such as 30s or 1m."""
    tls: Annotated[str | None, Text(metavar="DIR")] = None
    """Use TLS 1.3, and require a certificate from the source; DIR contains ca-cert.pem, ca-crl.pem (optional),
    server-cert.pem and server-key.pem, as for QEMU."""
    allow: Annotated[
        tuple[str, ...],
        Texts(metavar="NAME", unset="all sources with a certificate of the authority in ca-cert.pem"),
    ] = ()
    """With `tls`: authorise sources whose certificate has this common name or subject alternative name; can be
    repeated.
    """
    insecure: bool = False
    """Allow unencrypted connections to addresses other than loopback."""

    def __post_init__(self) -> None:
        check(self)
        if self.hugetlb and self.memory == "shared":
            raise UsageError("`hugetlb` cannot be combined with shared `memory`: remove one of them")
        if self.base and self.memory == "own":
            raise UsageError("`base` cannot be combined with separate `memory`: remove one of them")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Wait for one workload from `pageferry migrate`, and run it on this host. QEMU is started immediately with the "
        "given command line, and waits for memory and state; the machine must be the same as at the source. With "
        "--resume, serve a post-copy guest of this host whose receiver was killed before all of its memory had been "
        "received."
    )
    parser.add_argument("name", metavar="NAME", help="name of the workload on this host")
    add_options(parser, ReceiveOptions)
    parser.usage = "pageferry receive NAME [options] [-- QEMU ARGS...]"
