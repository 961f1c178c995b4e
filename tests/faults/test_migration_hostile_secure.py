"""Tests of authenticated peers that violate the protocol: they are refused in the same way as without TLS."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.errors import MigrationError
from pageferry.migration.transport import messages
from pageferry.migration.transport.addresses import resolve
from pageferry.migration.transport.connection import connect_control, connect_streams
from pageferry.migration.transport.tls import Trust
from pageferry.workloads.lifecycle import Status
from tests.certificates import Authority, hosts
from tests.kernel import moving
from tests.kernel.programs import DEADLINE, Program
from tests.network.strangers import IMPOSTORS, REFUSALS, WRONG, Peer, close_all, destination, hello

pytestmark = pytest.mark.usefixtures("root")

AUTHORITY = Authority()
STRANGE = 60
"""Number of connections that send damaged messages."""


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Return directories with the certificates of a source and of a receiver."""
    return hosts(tmp_path, AUTHORITY)


@pytest.fixture
def there(folders: tuple[Path, Path]) -> Iterator[Program]:
    with moving.receiver("there", "--timeout", "2", "--tls", str(folders[1])) as program:
        yield program


@pytest.fixture
def address(there: Program) -> str:
    return moving.address_of(there)


def still_receives(there: Program, address: str, source: Path) -> None:
    with moving.ledger("here") as here:
        with moving.migrating("here", address, "--tls", str(source)) as migration:
            assert migration.wait() == 0
        assert there.json()["type"] == "received"
        moving.ends_intact(here, "moved")


def test_rogue_authenticated_source_is_refused(there: Program, address: str, folders: tuple[Path, Path]) -> None:
    source, _ = folders
    for index, (reason, say) in enumerate(REFUSALS.items()):
        peer = Peer.connect(address, tls=source)
        say(peer)
        assert reason in peer.is_refused(), index
        assert peer.is_closed()
    still_receives(there, address, source)


def test_receiver_survives_damaged_messages(there: Program, address: str, folders: tuple[Path, Path]) -> None:
    """The receiver refuses some messages, and waits for the rest of others. It accepts no sender as a source."""
    source, _ = folders
    dice = random.Random(STRANGE)
    frame = messages.encode(hello(regions=[]))
    for _ in range(STRANGE):
        damaged = bytearray(frame)
        for _ in range(dice.randrange(1, 6)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        end = dice.choice((len(damaged), dice.randrange(len(damaged))))
        peer = Peer.connect(address, tls=source)
        peer.write(bytes(damaged[:end]))
        peer.socket.close()
    still_receives(there, address, source)


@pytest.mark.parametrize("reason", WRONG)
def test_protocol_violation_of_an_authenticated_source_ends_the_migration(
    reason: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    code, said = WRONG[reason]
    source, receiver = folders
    with (
        open(tmp_path / "stderr", "w+") as stderr,
        moving.receiver("there", "--timeout", "2", "--tls", str(receiver), stderr=stderr) as there,
    ):
        asyncio.run(_say(moving.address_of(there), source, said))
        assert there.wait() == code
        stderr.seek(0)
        assert reason in stderr.read()


async def _say(text: str, source: Path, said: list[messages.Message]) -> None:
    """Send messages as an authenticated source that has been accepted and has connected its page stream.

    Check that the receiver ends the migration.
    """
    address = resolve(text, insecure=False, what="receiver")
    channel = await connect_control(address, DEADLINE, Trust(source, "source"))
    await channel.send(hello())
    token = (await channel.receive(messages.Welcome)).token
    (stream,) = await connect_streams(channel, address, token, range(1))
    for message in said:
        await channel.send(message)
    with pytest.raises(MigrationError):
        await channel.receive_any()
    stream.close()
    await channel.close()


BEFORE_STREAMS = IMPOSTORS[:11]
"""Rogue destinations that misbehave before the page streams are connected."""


@pytest.mark.parametrize("number", range(len(BEFORE_STREAMS)))
def test_rogue_authenticated_destination_leaves_the_workload_running(number: int, folders: tuple[Path, Path]) -> None:
    code, behave = BEFORE_STREAMS[number]
    source, receiver = folders
    with moving.ledger("here") as here:
        with (
            destination(behave, tls=receiver) as address,
            moving.migrating("here", address, "--timeout", "1", "--tls", str(source)) as migration,
        ):
            assert migration.wait() == code
        assert moving.status("here") is Status.RUNNING
        moving.runs("here")
        moving.ends_intact(here)
