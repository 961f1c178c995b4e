"""TLS of a migration: certificates in QEMU's directory layout, authorisation of the peer, and sessions over asyncio.

Issuer, names, validity and revocation are checked on the control connection. The peer accepted there is a `Peer`, and
page streams are opened to that peer only: they require the same certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Literal, Protocol

from pageferry._engine import TlsIdentity, TlsSession
from pageferry.errors import AuthenticationError, UsageError
from pageferry.host import files

log = getLogger(__name__)

Role = Literal["source", "receiver"]

CA, CRL = "ca-cert.pem", "ca-crl.pem"
FILES: dict[Role, tuple[str, str]] = {
    "source": ("client-cert.pem", "client-key.pem"),
    "receiver": ("server-cert.pem", "server-key.pem"),
}
"""File names of certificate and private key, the same as for QEMU's tls-creds-x509."""
CHUNK = 1 << 14
"""Maximum number of bytes read from a peer at a time."""
MAX_FILE = 1 << 20
"""Maximum size of a certificate or key file, bytes."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Peer of an authenticated control connection."""

    certificate: bytes
    """Certificate of the peer, in DER format."""
    names: tuple[str, ...]
    """Common names and subject alternative names (SAN) in the certificate."""
    identity: TlsIdentity
    """Our certificate and key."""

    def __str__(self) -> str:
        return " or ".join(self.names[:4]) or "a peer without a name"

    def page_session(self) -> TlsSession:
        """Return the TLS session of a page stream to this peer; any other certificate is rejected."""
        return self.identity.connect(self.certificate)


class Trust:
    """Our certificate, and the rules by which peers are accepted.

    `folder` contains ca-cert.pem, optionally ca-crl.pem (certificates in it are rejected), and server-cert.pem and
    server-key.pem at the receiver, client-cert.pem and client-key.pem at the source. `hostname`: host name expected in
    the receiver's certificate; None for the host that was connected to. `allow`: names of the sources that are
    accepted; if empty, all with a certificate of the authority.

    Raises UsageError for files that are missing or do not match.
    """

    def __init__(self, folder: Path, role: Role, *, hostname: str | None = None, allow: Sequence[str] = ()) -> None:
        self.role: Role = role
        self.hostname = hostname
        self.allow = frozenset(allow)
        certificate, key = (folder / name for name in FILES[role])
        self.identity = _identity(certificate, key)
        self._context = _context(role)
        with _complaining(certificate):
            self._context.load_cert_chain(certificate, key)
        with _complaining(folder / CA):
            self._context.load_verify_locations(cadata=_read(folder / CA).decode("ascii", "replace"))
        if (folder / CRL).exists():
            with _complaining(folder / CRL):
                _read(folder / CRL)  # raises UsageError if it is not a readable file
                self._context.load_verify_locations(folder / CRL)
            self._context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF

    def control_session(self, host: str | None = None) -> ControlSession:
        """Return our TLS session of a control connection. `host`: host that the source connects to."""
        return ControlSession(self, self._context, self.hostname or host)

    def authorize(self, peer: Peer) -> None:
        """Authorise a source. Raises AuthenticationError if none of its names is in `allow`."""
        if self.allow and not self.allow.intersection(peer.names):
            raise AuthenticationError(
                f"cannot authorise {peer} to send workloads: its certificate has none of the names given with `allow`"
            )


class ControlSession:
    """TLS session of a control connection: like `TlsSession`, it performs no I/O itself.

    Raises AuthenticationError if either side rejects the other's certificate, or the peer violates the protocol.
    """

    def __init__(self, trust: Trust, context: ssl.SSLContext, host: str | None) -> None:
        self._trust = trust
        self._peer = "the receiver" if trust.role == "source" else "the source"
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = trust.role == "receiver"
        try:
            self._object = context.wrap_bio(
                self._incoming, self._outgoing, server_side=server, server_hostname=None if server else host
            )
        except ValueError as error:
            raise UsageError(f"invalid name of the receiver {host!r}: {error}") from error
        self.established = False
        if not server:
            self.feed(b"")

    def feed(self, received: bytes) -> None:
        """Process received bytes, and continue the handshake until it needs more input."""
        if received:
            self._incoming.write(received)
        if self.established:
            return
        try:
            self._object.do_handshake()
            self.established = True
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLError, ssl.CertificateError) as error:
            raise self._refusal(error) from error

    def outgoing(self) -> bytes:
        """Return the bytes to send to the peer. After an error, they contain the alert, and must be sent too."""
        return self._outgoing.read()

    def read(self) -> bytes:
        """Return the data received so far; empty if more input is needed. Raises EOFError if the peer has closed the
        session."""
        try:
            return self._object.read(1 << 16)
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLZeroReturnError:
            raise EOFError from None
        except ssl.SSLError as error:
            raise self._refusal(error) from error

    def write(self, data: bytes) -> None:
        """Encrypt data for the peer."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._object.write(rest) :]

    def close(self) -> None:
        """Send close_notify."""
        # The error is raised because the peer has not sent close_notify. This side does not wait for it.
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()

    def peer(self) -> Peer:
        """Return the authenticated peer. The session must be established."""
        certificate = self._object.getpeercert(binary_form=True)
        assert certificate is not None  # both sides must present one
        return Peer(certificate, _names(self._object.getpeercert() or {}), self._trust.identity)

    def _refusal(self, error: ssl.SSLError) -> AuthenticationError:
        return AuthenticationError(explain(error, self._peer))


def explain(error: ssl.SSLError, peer: str) -> str:
    """Describe an error of the TLS connection to `peer`, and what to do about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = _VERIFIED.get(error.verify_code, "")
        return f"the certificate of {peer} is not accepted: {error.verify_message.rstrip('.')}{advice}"
    reason = error.reason or str(error)
    _, alert, what = reason.partition("ALERT_")
    if alert:
        said = what.lower().replace("_", " ")
        return f"{peer} closed the TLS connection ({said}){_ALERTS.get(what, '')}"
    return f"cannot establish a TLS connection to {peer}: {_REASONS.get(reason, reason.lower().replace('_', ' '))}"


_AUTHORITY = "; both sides need certificates of one authority, whose certificate is ca-cert.pem"
_VERIFIED = {
    3: "; ca-crl.pem must contain the revocation list of the issuing authority",
    7: _AUTHORITY,
    9: "; check the clock",
    10: "; issue a new one, or set the clock",
    12: "; fetch a new ca-crl.pem",
    18: _AUTHORITY,
    19: _AUTHORITY,
    20: _AUTHORITY,
    21: _AUTHORITY,
    23: "; issue a new one",
    26: "; a receiver needs a certificate for server authentication, a source one for client authentication",
    62: "; give one of its names with `tls_hostname`, or issue a certificate with this name",
    64: "; give one of its names with `tls_hostname`, or issue a certificate with this address",
}
"""Advice by X509_V_ERR code."""
_ALERTS = {
    "UNKNOWN_CA": f": it does not accept our certificate{_AUTHORITY}",
    "DECRYPT_ERROR": f": it does not accept our certificate{_AUTHORITY}",
    "CERTIFICATE_EXPIRED": ": our certificate or its ca-crl.pem has expired, or its clock is wrong",
    "CERTIFICATE_REVOKED": ": our certificate has been revoked",
    "CERTIFICATE_REQUIRED": ": it received no certificate",
    "BAD_CERTIFICATE": ": it does not accept our certificate; check that it has the name that was connected to",
    "UNSUPPORTED_CERTIFICATE": ": our certificate is not for this purpose (server or client authentication)",
    "CERTIFICATE_UNKNOWN": ": it does not accept our certificate; its log states the reason",
    "PROTOCOL_VERSION": ": it does not support TLS 1.3",
}
_REASONS = {
    "WRONG_VERSION_NUMBER": "it does not use TLS; give `tls` on both sides",
    "HTTP_REQUEST": "it does not use TLS",
    "UNSUPPORTED_PROTOCOL": "it does not support TLS 1.3",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it has sent no certificate",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "a record was modified in transfer",
}


def _context(role: Role) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if role == "source" else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.hostname_checks_common_name = False
    if role == "receiver":
        context.num_tickets = 0  # sessions are not resumed
    return context


def _identity(certificate: Path, key: Path) -> TlsIdentity:
    secret = _read(key)
    if key.stat().st_mode & stat.S_IRWXO:
        log.warning("%s: other users can read or write it; run chmod 600 on it", key)
    try:
        return TlsIdentity(_read(certificate), secret)
    except ValueError as error:
        raise UsageError(
            f"cannot use {certificate} and {key.name}: {error}; both must be PEM and belong together, and the key "
            "must be unencrypted, and RSA, Ed25519, or ECDSA on P-256 or P-384"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return files.read_regular(path, MAX_FILE)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; a directory for `tls` has {CA}, at the source "
            f"{' and '.join(FILES['source'])}, at the receiver {' and '.join(FILES['receiver'])}"
        ) from error


class _complaining:
    """Context manager that converts an error of the ssl module about a file to a UsageError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | ValueError):
            raise UsageError(f"cannot use {self._path}: {error}") from error


def _names(shown: dict[str, Any]) -> tuple[str, ...]:
    """Return the names in a certificate, as returned by `SSLObject.getpeercert`."""
    subject = [value for group in shown.get("subject", ()) for kind, value in group if kind == "commonName"]
    others = [value for kind, value in shown.get("subjectAltName", ()) if isinstance(value, str)]
    return tuple(dict.fromkeys(subject + others))


class Session(Protocol):
    """Common interface of `ControlSession` and the engine's `TlsSession`."""

    def feed(self, received: bytes) -> None: ...
    def outgoing(self) -> bytes: ...
    @property
    def established(self) -> bool: ...


async def shake_hands(connection: socket.socket, session: Session) -> None:
    """Complete the handshake, after which both sides are authenticated. The caller limits the time.

    Raises AuthenticationError (reported to the peer by an alert), EOFError, OSError.
    """
    loop = asyncio.get_running_loop()
    await _flush(connection, session)
    while not session.established:
        received = await loop.sock_recv(connection, CHUNK)
        if not received:
            raise EOFError
        await feed(connection, session, received)


async def feed(connection: socket.socket, session: Session, received: bytes) -> None:
    """Pass received bytes to a session, and send its output to the peer. Raises AuthenticationError (reported to the
    peer by an alert), OSError."""
    try:
        session.feed(received)
    except (AuthenticationError, PermissionError) as error:
        with contextlib.suppress(OSError):
            await _flush(connection, session)
        if isinstance(error, PermissionError):
            raise AuthenticationError(f"cannot authenticate the peer of a page stream: {error}") from error
        raise
    await _flush(connection, session)


async def _flush(connection: socket.socket, session: Session) -> None:
    if waiting := session.outgoing():
        await asyncio.get_running_loop().sock_sendall(connection, waiting)


class SecureStream:
    """Reader and writer of a control connection over TLS, with the interface of asyncio's streams."""

    def __init__(self, session: ControlSession, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._session = session
        self._reader = reader
        self._writer = writer
        self._opened = bytearray()

    async def readexactly(self, count: int) -> bytes:
        """See StreamReader. Raises AuthenticationError for invalid records and for alerts of the peer."""
        while len(self._opened) < count:
            try:
                if opened := self._session.read():
                    self._opened += opened
                    continue
            except EOFError:
                sealed = b""
            else:
                sealed = await self._reader.read(CHUNK)
            if not sealed:
                raise asyncio.IncompleteReadError(bytes(self._opened), count)
            self._session.feed(sealed)
            self._flush()
        taken = bytes(self._opened[:count])
        del self._opened[:count]
        return taken

    def write(self, data: bytes) -> None:
        """See StreamWriter."""
        self._session.write(data)
        self._flush()

    async def drain(self) -> None:
        """See StreamWriter."""
        await self._writer.drain()

    def close(self) -> None:
        """See StreamWriter. Send a close_notify alert first."""
        self._session.close()
        self._flush()
        self._writer.close()

    async def wait_closed(self) -> None:
        """See StreamWriter."""
        await self._writer.wait_closed()

    def _flush(self) -> None:
        if (waiting := self._session.outgoing()) and not self._writer.is_closing():
            self._writer.write(waiting)
