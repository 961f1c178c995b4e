"""Python packages of the extra `stores`, imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
