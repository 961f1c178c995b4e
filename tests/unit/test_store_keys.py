"""Key files, key commands, and keys of domains that are wrapped with them, also by another implementation of age."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pageferry.errors import UnsupportedError, UsageError, WrongKey
from pageferry.stores import keys
from pageferry.stores.keys import Access, Keys
from pageferry.stores.layout import WrappedKey
from pageferry.stores.options import KeyOptions, OpenOptions
from pageferry.stores.sealing import Domain

pyrage = pytest.importorskip("pyrage", reason="the extra `stores` is not installed")
Identity: Any = pyrage.x25519.Identity


@pytest.fixture(scope="module")
def identity() -> Any:
    """Return an identity of age."""
    return Identity.generate()


def of(*lines: object) -> Keys:
    return keys.parse("\n".join(map(str, lines)).encode(), "here")


def test_raw_keys_are_read_as_bytes_and_as_hexadecimal_digits() -> None:
    raw = bytes(range(100, 132))
    assert keys.parse(raw, "here") == keys.parse(f"{raw.hex().upper()}\n".encode(), "here") == Keys(raw=raw)


def test_identities_include_their_recipients(identity: Any) -> None:
    other = Identity.generate().to_public()
    found = of("# created: today", "", identity, f"  {other}\r", other)
    assert [str(one) for one in found.identities] == [str(identity)]
    assert found.recipients == tuple(sorted([str(identity.to_public()), str(other)]))


@pytest.mark.parametrize(
    ("contents", "cause"),
    [
        (b"", "contains no key"),
        (b"# only a comment\n", "contains no key"),
        (bytes(31), "line 1 is not a key"),
        (b"0123456789abcdef" * 2, "its 32 bytes are a text, not random bytes"),
        (b"\xff" * 33, "33 bytes that are not text"),
        (b"x" * 64, "line 1 is not a key"),
        (b"# ok\nage1notarecipient\n", "line 2 is not a valid X25519 recipient"),
        (b"AGE-SECRET-KEY-1SECRET\n", "line 1 is not a valid X25519 identity"),
        (b"ssh-ed25519 AAAA\n", "line 1 is not a key"),
    ],
)
def test_invalid_keys_are_refused_without_their_contents(contents: bytes, cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        keys.parse(contents, "here")
    assert "SECRET\n" not in str(caught.value)
    assert "xxxx" not in str(caught.value)


def test_keys_are_not_in_representations(identity: Any) -> None:
    assert "identities" not in repr(of(identity))
    assert "raw" not in repr(Keys(raw=bytes(32)))


# -- wrapped keys


def test_domain_is_unwrapped_by_each_of_its_recipients_only(identity: Any) -> None:
    other, domain = Identity.generate(), Domain.create()
    wrapped = of(identity, other.to_public()).wrap(domain)
    for reader in (of(identity), of(other)):
        opened = reader.unwrap(wrapped)
        assert opened is not None
        assert opened.secret == domain.secret
    for stranger in (of(Identity.generate()), of(identity.to_public()), Keys(raw=bytes(32))):
        assert stranger.unwrap(wrapped) is None


def test_raw_key_wraps_a_domain_for_itself_only() -> None:
    mine, domain = Keys(raw=os.urandom(32)), Domain.create()
    wrapped = mine.wrap(domain)
    opened = mine.unwrap(wrapped)
    assert opened is not None
    assert opened.secret == domain.secret
    assert Keys(raw=os.urandom(32)).unwrap(wrapped) is None
    assert mine.authentic(wrapped)


def test_domain_is_authentic_only_for_identities_of_its_writer(identity: Any) -> None:
    other, domain = Identity.generate(), Domain.create()
    by_recipient, by_identity = of(identity.to_public()).wrap(domain), of(identity, other.to_public()).wrap(domain)
    assert not of(identity).authentic(by_recipient)
    assert of(identity).authentic(by_identity)
    assert not of(other).authentic(by_identity)
    moved = msgspec.structs.replace(by_recipient, proofs=by_identity.proofs)  # of other recipients
    assert not of(identity).authentic(moved)


def test_domain_is_continued_only_for_the_same_recipients(identity: Any) -> None:
    domain, more = Domain.create(), of(identity, Identity.generate().to_public())
    wrapped = of(identity).wrap(domain)
    assert of(identity).same_recipients(wrapped, domain)
    assert not more.same_recipients(wrapped, domain)


@pytest.mark.parametrize("raw", [False, True])
def test_changed_wrapped_keys_are_refused(identity: Any, raw: bool) -> None:
    mine = Keys(raw=bytes(range(32))) if raw else of(identity)
    wrapped = mine.wrap(Domain.create())
    for at in range(0, len(wrapped.wrapped), 7):
        data = bytearray(wrapped.wrapped)
        data[at] ^= 1
        assert mine.unwrap(msgspec.structs.replace(wrapped, wrapped=bytes(data))) is None
    for changed in ({"domain": bytes(32)}, {"wrapped": b""}, {"form": "age" if raw else "raw"}):
        assert mine.unwrap(msgspec.structs.replace(wrapped, **changed)) is None


def test_access_names_what_is_missing(identity: Any) -> None:
    wrapped = of(identity).wrap(Domain.create())
    with pytest.raises(WrongKey, match="cannot read that: it is encrypted; give its key"):
        Access().unwrap(wrapped, "that")
    with pytest.raises(WrongKey, match=r"for recipients of age, and the given key \(a raw key\) does not open it"):
        Access(Keys(raw=bytes(32))).unwrap(wrapped, "that")
    with pytest.raises(WrongKey, match="cannot read that: it is not encrypted, although a key is given"):
        Access(of(identity)).check_plain("that")
    Access(of(identity), allow_plain=True).check_plain("that")
    Access().check_plain("that")


# -- another implementation of age


@pytest.fixture
def age() -> str:
    """Return the path of the program age."""
    if (found := shutil.which("age")) is None:
        pytest.skip("the program age is not installed")
    return found


def test_wrapped_key_is_read_by_another_implementation_of_age(age: str, identity: Any, tmp_path: Path) -> None:
    (tmp_path / "identity").write_text(f"{identity}\n")
    domain = Domain.create()
    wrapped = of(Identity.generate(), identity.to_public()).wrap(domain)
    done = subprocess.run(
        [age, "-d", "-i", tmp_path / "identity"], input=wrapped.wrapped, capture_output=True, check=True, timeout=60
    )
    assert done.stdout == domain.secret


def test_key_that_another_implementation_of_age_has_wrapped_is_read(age: str, identity: Any) -> None:
    domain, mine = Domain.create(), of(identity)
    recipients = [word for one in (Identity.generate(), identity) for word in ("-r", str(one.to_public()))]
    done = subprocess.run([age, *recipients], input=domain.secret, capture_output=True, check=True, timeout=60)
    wrapped = WrappedKey(domain=domain.domain, recipients=bytes(32), form="age", wrapped=done.stdout, proofs=[])
    opened = mine.unwrap(wrapped)
    assert opened is not None
    assert opened.secret == domain.secret


def test_key_files_of_another_implementation_of_age_are_read(age: str) -> None:
    made = subprocess.run([f"{age}-keygen"], capture_output=True, check=True, timeout=60)
    found = keys.parse(made.stdout, "here")
    assert (len(found.identities), len(found.recipients)) == (1, 1)


# -- files and commands


def read(**options: Any) -> Access:
    return asyncio.run(keys.open_access(OpenOptions(**options)))


def test_key_file_is_read_and_its_mode_is_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, identity: Any
) -> None:
    path = tmp_path / "key"
    path.write_bytes(bytes(32))
    path.chmod(0o600)
    assert read(key=path, allow_plain=True) == Access(Keys(raw=bytes(32)), allow_plain=True)
    assert caplog.text == ""
    path.chmod(0o644)
    read(key=path)
    assert "other users can read this key" in caplog.text
    caplog.clear()
    path.write_text(str(identity.to_public()))
    read(key=path)
    assert caplog.text == ""


def test_key_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_bytes(bytes(keys.MAX_KEY_FILE + 1))
    for name, cause in (("none", "No such file"), ("fifo", "not a regular file"), ("long", "larger than")):
        with pytest.raises(UsageError, match=f"cannot read the key in .*{name}.*{cause}"):
            read(key=tmp_path / name)


def test_options_of_keys_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`key` cannot be combined with `key_command`"):
        KeyOptions(key=tmp_path, key_command="true")
    with pytest.raises(UsageError, match="`allow_plain` has no effect without `key`"):
        OpenOptions(allow_plain=True)


def test_key_command_runs_once_without_a_shell(tmp_path: Path) -> None:
    program = tmp_path / "print key"
    program.write_text(f'#!/bin/sh\necho run >>{tmp_path}/runs\nprintf %s "$1"\n')
    program.chmod(0o700)
    found = read(key_command=f"'{program}' {'ab' * 32}")
    assert found.keys == Keys(raw=b"\xab" * 32)
    assert (tmp_path / "runs").read_text() == "run\n"
    with pytest.raises(UsageError, match="line 1 is not a key"):
        read(key_command=f"'{program}' '$(echo no shell)'")


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("false", "the key command false failed with exit code 1"),
        ("sh -c 'kill -9 $$'", "the key command sh was ended by SIGKILL"),
        ("/nowhere/program", "cannot run the key command /nowhere/program"),
        ("yes", "more than 65536 bytes"),
        ("true", "contains no key"),
        ("'unfinished", "invalid `key_command`"),
        ("''", "cannot run the key command"),
        ("# nothing", "cannot run the key command #"),
    ],
)
def test_failed_key_commands_are_reported(command: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        read(key_command=command)


def test_key_command_is_killed_after_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "COMMAND_TIMEOUT", 0.2)
    with pytest.raises(UsageError, match=r"sleep has not ended within 0.2 s"):
        read(key_command="sleep 1000")


def test_cancelled_operation_kills_its_key_command(tmp_path: Path) -> None:
    async def cancel() -> int:
        program = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
        command = f'{sys.executable} -c "{program}; time.sleep(1000)"'
        task = asyncio.ensure_future(keys.open_access(KeyOptions(key_command=command)))
        written = tmp_path / "pid"
        while not written.exists() or not (pid := written.read_text()):  # noqa: ASYNC110  # another process writes it
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return int(pid)

    pid, end = asyncio.run(cancel()), time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(UnsupportedError, match=r"the Python package pyrage is missing; pip install 'pageferry\[stores"):
        read(key_command="true")
