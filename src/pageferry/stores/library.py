"""Python packages of the extra `stores`, imported on first use."""

from __future__ import annotations

import atexit
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pageferry.errors import UnsupportedError

if TYPE_CHECKING:
    from types import ModuleType

_POLL, _QUIET, _END = 0.002, 5, 1.0
"""Interval of checks whether the client's threads sleep, seconds; number of such checks; maximum time, seconds."""


def obstore() -> ModuleType:
    """Import and return the client of object stores. Raises UnsupportedError if a package of the extra is missing."""
    try:
        import blake3  # noqa: F401  # both are needed for every operation
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as missing:
        raise UnsupportedError(
            f"cannot use object stores: the Python package {missing.name} is missing; pip install 'pageferry[stores]'"
        ) from missing
    atexit.unregister(_await_threads)
    atexit.register(_await_threads)
    return obstore


def _await_threads() -> None:
    """Wait until the threads of the client sleep. After a call, they release its Python objects. A thread that takes
    the GIL for this while the interpreter is being finalised aborts the process (Python 3.11 to 3.13)."""
    deadline, quiet = time.monotonic() + _END, 0
    while quiet < _QUIET and time.monotonic() < deadline:
        time.sleep(_POLL)  # releases the GIL
        quiet = quiet + 1 if all(map(_sleeps, Path("/proc/self/task").iterdir())) else 0


def _sleeps(thread: Path) -> bool:
    """Return whether a thread sleeps, or is not one of the client."""
    with contextlib.suppress(OSError, ValueError):  # the thread has exited
        name, _, rest = (thread / "stat").read_text().partition("(")[2].rpartition(")")
        return not name.startswith("tokio") or rest.split()[0] == "S"
    return True


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return the BLAKE3 digest of data, 32 bytes. Releases the GIL."""
    from blake3 import blake3

    return blake3(data).digest()


def keyed_digest(data: bytes | bytearray | memoryview, key: bytes) -> bytes:
    """Return the keyed BLAKE3 digest of data, 32 bytes. Releases the GIL."""
    from blake3 import blake3

    return blake3(data, key=key).digest()


def derived_key(secret: bytes, label: bytes, salt: bytes = b"") -> bytes:
    """Derive a key of 32 bytes from a secret of at least 256 random bits, by HKDF with SHA-256."""
    check_encryption()
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt, b"pageferry store 1: " + label).derive(secret)


class Aead:
    """AES-256-GCM under a key. Both calls release the GIL."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher = AESGCM(key)

    def encrypt(self, nonce: bytes, data: bytes | bytearray, bound: bytes) -> bytes:
        """Return the encrypted data, 16 bytes longer. `bound`: associated data."""
        return self._cipher.encrypt(nonce, data, bound)

    def decrypt_into(self, nonce: bytes, data: bytes | memoryview, bound: bytes, target: bytearray) -> bool:
        """Decrypt data into a buffer that is 16 bytes shorter. Return False if the data or `bound` have been changed;
        the buffer then has no valid contents."""
        from cryptography.exceptions import InvalidTag

        try:
            self._cipher.decrypt_into(nonce, data, bound, target)
        except InvalidTag:
            return False
        return True


def check_encryption() -> None:
    """Raise UnsupportedError unless the packages for encrypted images are installed."""
    try:
        import cryptography  # noqa: F401
        import pyrage  # noqa: F401
    except ImportError as missing:
        raise UnsupportedError(
            f"cannot encrypt or decrypt images: the Python package {missing.name} is missing; "
            "pip install 'pageferry[stores]'"
        ) from missing


def age() -> Any:
    """Import and return the package for the age format. Raises UnsupportedError if it is missing."""
    check_encryption()
    import pyrage
    import pyrage.x25519

    return pyrage
