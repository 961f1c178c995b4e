"""Keys of users, and the keys of domains that are wrapped with them.

A key file, or the output of a command, contains either

- a raw key of 256 bits: 32 bytes, or 64 hexadecimal digits;
- lines with age X25519 identities (`AGE-SECRET-KEY-1...`) and recipients (`age1...`), and comments (`#`).

The key of a domain is wrapped in each manifest: by AES-256-GCM under the raw key, or as an age file for all recipients.
Recipients can be public, and any user who knows them can wrap a key. A domain is therefore authentic only if it was
wrapped with the raw key, or has a proof: a code (HMAC) under a key that is derived from one of the reader's identities.
"""

from __future__ import annotations

import hmac
import os
import select
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

from pageferry.errors import UsageError, WrongKey
from pageferry.host import files
from pageferry.host.blocking import on_thread
from pageferry.stores.layout import WrappedKey
from pageferry.stores.library import Aead, age, check_encryption, derived_key
from pageferry.stores.options import KeyOptions, OpenOptions
from pageferry.stores.sealing import KEY, TAG, Domain

log = getLogger(__name__)

MAX_KEY_FILE = 64 << 10
"""Maximum size of a key file, and of the output of a key command, bytes."""
COMMAND_TIMEOUT = 120.0
"""Maximum duration of a key command, which may ask for a PIN, seconds."""
_IDENTITY, _RECIPIENT = "AGE-SECRET-KEY-1", "age1"
_FORMS = "32 bytes, 64 hexadecimal digits, or lines with age identities (AGE-SECRET-KEY-1...) and recipients (age1...)"


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of a user."""

    raw: bytes | None = field(default=None, repr=False)
    identities: tuple[Any, ...] = field(default=(), repr=False)
    """Identities of the package pyrage."""
    recipients: tuple[str, ...] = ()
    """Recipients, sorted; those of the identities are included."""

    def wrap(self, domain: Domain) -> WrappedKey:
        """Wrap the key of a domain for all recipients."""
        recipients = domain.fingerprint(self._recipients)
        if self.raw is not None:
            salt = os.urandom(KEY)
            cipher = Aead(derived_key(self.raw, b"wrap", salt))
            wrapped = salt + cipher.encrypt(bytes(12), domain.secret, domain.domain + recipients)
            return WrappedKey(domain=domain.domain, recipients=recipients, form="raw", wrapped=wrapped, proofs=[])
        kind = age().x25519.Recipient
        wrapped = age().encrypt(domain.secret, [kind.from_str(one) for one in self.recipients])
        proofs = [_proof(one, domain.domain, recipients) for one in self.identities]
        return WrappedKey(domain=domain.domain, recipients=recipients, form="age", wrapped=wrapped, proofs=proofs)

    def unwrap(self, key: WrappedKey) -> Domain | None:
        """Return the domain of a wrapped key; None if these keys do not open it."""
        secret = self._unwrap(key)
        if secret is None or len(secret) != KEY:
            return None
        domain = Domain(secret)
        return domain if domain.domain == key.domain else None

    def authentic(self, key: WrappedKey) -> bool:
        """Return whether a wrapped key that these keys open was wrapped by a user with one of these secret keys."""
        if key.form == "raw":
            return True
        expected = [_proof(one, key.domain, key.recipients) for one in self.identities]
        return any(hmac.compare_digest(one, proof) for one in expected for proof in key.proofs)

    def continued(self, key: WrappedKey) -> Domain | None:
        """Return the domain of a wrapped key if uploads with these keys can continue it: it was wrapped by a user with
        one of these secret keys, for exactly the same recipients. Otherwise, return None."""
        if (domain := self.unwrap(key)) is None:
            return None
        return domain if self.authentic(key) and self.same_recipients(key, domain) else None

    def same_recipients(self, key: WrappedKey, domain: Domain) -> bool:
        """Return whether a key was wrapped for exactly the recipients of these keys."""
        return hmac.compare_digest(key.recipients, domain.fingerprint(self._recipients))

    @property
    def _recipients(self) -> bytes:
        return "\n".join(self.recipients).encode()

    def _unwrap(self, key: WrappedKey) -> bytes | None:
        if key.form == "raw":
            if self.raw is None or len(key.wrapped) != KEY + KEY + TAG:
                return None
            cipher, secret = Aead(derived_key(self.raw, b"wrap", key.wrapped[:KEY])), bytearray(KEY)
            bound = key.domain + key.recipients
            return bytes(secret) if cipher.decrypt_into(bytes(12), key.wrapped[KEY:], bound, secret) else None
        if not self.identities:
            return None
        try:
            return bytes(age().decrypt(key.wrapped, list(self.identities)))
        except age().DecryptError:
            return None


@dataclass(frozen=True, slots=True)
class Access:
    """Keys that an operation uses, and whether it accepts images that are not encrypted although keys are given."""

    keys: Keys | None = None
    allow_plain: bool = False

    def unwrap(self, key: WrappedKey, what: str) -> Domain:
        """Return the domain of an encrypted image. `what`: description of the image, for messages.

        Raises WrongKey.
        """
        if self.keys is None:
            raise WrongKey(f"cannot read {what}: it is encrypted; give its key with `key` or `key_command`")
        if (domain := self.keys.unwrap(key)) is not None:
            return domain
        kind = "a raw key" if key.form == "raw" else "recipients of age"
        given = _description(self.keys)
        raise WrongKey(f"cannot read {what}: it is encrypted for {kind}, and the given key ({given}) does not open it")

    def check_plain(self, what: str) -> None:
        """Raise WrongKey if keys are given, and `allow_plain` is not. `what`: image that is not encrypted."""
        if self.keys is not None and not self.allow_plain:
            raise WrongKey(
                f"cannot read {what}: it is not encrypted, although a key is given; it may have been replaced; if it "
                "is meant to be unencrypted, give no key, or `allow_plain`"
            )

    def check_authentic(self, key: WrappedKey, what: str) -> None:
        """Raise WrongKey if any user who knows a recipient can have created the image. `what`: the image."""
        if self.keys is not None and not self.keys.authentic(key):
            raise WrongKey(
                f"cannot read {what}: any user who knows the recipient can have encrypted it: it was pushed without "
                "any of the given identities; add @DIGEST to its URL, the digest of the manifest that the push printed"
            )


NO_KEYS = Access()
"""Access to images that are not encrypted."""


async def open_access(options: KeyOptions) -> Access:
    """Read the keys that options name. On cancellation, the key command is killed.

    Raises UsageError if there is no valid key, UnsupportedError if a package of the extra `stores` is missing.
    """
    allow_plain = isinstance(options, OpenOptions) and options.allow_plain
    if options.key is None and options.key_command is None:
        return NO_KEYS
    check_encryption()
    if options.key is not None:
        path = options.key
        return Access(await on_thread(lambda: _read_file(path)), allow_plain)
    assert options.key_command is not None
    command = _Command(options.key_command)
    return Access(await on_thread(command.run, command.kill), allow_plain)


def parse(contents: bytes, where: str) -> Keys:
    """Parse the contents of a key file. `where`: its name, for messages. No message contains a part of a key.

    Raises UsageError.
    """
    if len(contents) == KEY:
        if contents.isascii() and contents.decode().isprintable():
            raise UsageError(
                f"cannot read the key in {where}: its 32 bytes are a text, not random bytes; expected {_FORMS}"
            )
        return Keys(raw=contents)
    try:
        text = contents.decode("ascii").strip()
    except UnicodeDecodeError:
        raise UsageError(
            f"cannot read the key in {where}: it has {len(contents)} bytes that are not text; expected {_FORMS}"
        ) from None
    if len(text) == 2 * KEY and not text.startswith(_RECIPIENT):
        try:
            return Keys(raw=bytes.fromhex(text))
        except ValueError:
            pass
    identities, recipients = [], set()
    for number, kind, line in _lines(text, where):
        try:
            if kind == "identity":
                identity = age().x25519.Identity.from_str(line)
                identities.append(identity)
                recipients.add(str(identity.to_public()))
            else:
                recipients.add(str(age().x25519.Recipient.from_str(line)))
        except (age().IdentityError, age().RecipientError):
            raise UsageError(
                f"cannot read the key in {where}: line {number} is not a valid X25519 {kind} of age; other kinds are "
                "not supported"
            ) from None
    if not recipients:
        raise UsageError(f"cannot read the key in {where}: it contains no key; expected {_FORMS}")
    return Keys(identities=tuple(identities), recipients=tuple(sorted(recipients)))


def _lines(text: str, where: str) -> Iterator[tuple[int, str, str]]:
    """Yield number, kind and contents of the lines of an age key file. Raises UsageError."""
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line.startswith(_IDENTITY):
            yield number, "identity", line
        elif line.startswith(_RECIPIENT):
            yield number, "recipient", line
        elif line and not line.startswith("#"):
            raise UsageError(f"cannot read the key in {where}: line {number} is not a key; expected {_FORMS}")


def _proof(identity: Any, domain: bytes, recipients: bytes) -> bytes:
    """Return the code by which the owner of an identity authenticates a domain and its recipients."""
    return hmac.digest(derived_key(str(identity).encode(), b"proof"), domain + recipients, "sha256")


def _description(keys: Keys) -> str:
    if keys.raw is not None:
        return "a raw key"
    return f"{len(keys.identities)} identities, {len(keys.recipients)} recipients"


def _read_file(path: Path) -> Keys:
    try:
        mode = os.stat(path).st_mode
        contents = files.read_regular(path, MAX_KEY_FILE)
    except OSError as error:
        raise UsageError(f"cannot read the key in {path}: {error.strerror}; give another file with `key`") from error
    found = parse(contents, str(path))
    if (found.raw is not None or found.identities) and mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("%s: other users can read this key; chmod 600 %s", path, path)
    return found


class _Command:
    """Command that prints a key. It runs without a shell."""

    def __init__(self, text: str) -> None:
        self._where = "the output of the key command"
        try:
            self._words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"invalid `key_command`: {error}; quote it as for a shell") from error
        if not self._words:
            raise UsageError("invalid `key_command`: expected a program and its arguments")
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    def run(self) -> Keys:
        """Run the command, and parse its output. Raises UsageError."""
        name = self._words[0]
        try:
            self._process = subprocess.Popen(self._words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot run the key command {name}: {error}; see `key_command`") from error
        with self._process as process:
            if self._killed:
                process.kill()
            output = self._output(process)
        if process.returncode != 0:
            raise UsageError(f"cannot read the key: the key command {name} {_ended(process.returncode)}")
        return parse(output, self._where)

    def kill(self) -> None:
        """Kill the command."""
        self._killed = True
        if self._process is not None:
            self._process.kill()

    def _output(self, process: subprocess.Popen[bytes]) -> bytes:
        """Return what the command prints until it exits. Its number of bytes is bounded. Raises UsageError."""
        assert process.stdout is not None
        output, end, ready = b"", time.monotonic() + COMMAND_TIMEOUT, select.poll()
        ready.register(process.stdout, select.POLLIN)
        try:
            while ready.poll(max(end - time.monotonic(), 0) * 1e3):
                if not (piece := os.read(process.stdout.fileno(), MAX_KEY_FILE)):
                    process.wait(max(end - time.monotonic(), 0))
                    return output
                output += piece
                if len(output) > MAX_KEY_FILE:
                    raise UsageError(f"cannot read the key: {self._where} has more than {MAX_KEY_FILE} bytes")
            raise subprocess.TimeoutExpired(self._words, COMMAND_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise UsageError(
                f"cannot read the key: the key command {self._words[0]} has not ended within {COMMAND_TIMEOUT:g} s"
            ) from None
        finally:
            process.kill()  # no effect after `wait`


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
