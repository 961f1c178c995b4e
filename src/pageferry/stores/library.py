"""Python packages of the extra `stores`, imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pageferry.errors import UnsupportedError

if TYPE_CHECKING:
    from types import ModuleType


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
    return obstore


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
