"""Protection of stored contents: by digests alone, or by encryption under the key of a domain.

A key domain is a random key of 256 bits. All other keys are derived from it (HKDF-SHA-256, one label for each use):

- The content address of a storage block is its keyed BLAKE3 digest. Equal blocks of a domain have equal addresses.
- A block is encrypted by AES-256-GCM with a key that is derived from its address, and a constant nonce. Another
  contents has another address, and thus another key: a key and nonce are never used for two different blocks.
- The parts of a manifest, and the description in a reference, have keys that are derived from 256 random bits and the
  name of the part. Each of these keys encrypts one message.

The associated data of a block are the domain, the address and the length. The table of storage blocks, which is a part
of the manifest, binds the address to a position in the image.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Protocol

from pageferry.stores.library import Aead, derived_key, digest, keyed_digest

TAG = 16
"""Number of bytes by which an encrypted part is longer than its contents."""
KEY = 32
"""Length of a key, bytes."""
_NONCE = bytes(12)


class BlockOpener(Protocol):
    """Protection of the storage blocks of an image, for readers."""

    def open_block(self, stored: memoryview, address: bytes) -> bytearray | None:
        """Return the contents of a stored block; None unless it is the block with this address."""


class Sealing(BlockOpener, Protocol):
    """Protection of the contents of an image."""

    @property
    def domain(self) -> bytes:
        """Identifier of the key domain; empty without encryption."""

    @property
    def overhead(self) -> int:
        """Number of bytes by which a stored block or part is longer than its contents."""

    def address(self, block: bytes | bytearray | memoryview) -> bytes:
        """Return the content address of a storage block in normal form, 32 bytes."""

    def seal_block(self, block: bytearray, address: bytes) -> bytes | bytearray:
        """Return a storage block as it is stored in a pack."""

    def seal_part(self, salt: bytes, label: bytes, contents: bytes, bound: bytes = b"") -> bytes:
        """Return a part of a manifest or of a reference as it is stored. `bound`: associated data."""

    def open_part(self, salt: bytes, label: bytes, stored: memoryview | bytes, bound: bytes = b"") -> memoryview | None:
        """Return the contents of a stored part; None if it, its label or its associated data are not those of
        `seal_part`."""


class _Plain:
    """Contents that are stored as they are. Digests in the manifest identify the parts."""

    domain = b""
    overhead = 0

    def address(self, block: bytes | bytearray | memoryview) -> bytes:
        return digest(block)

    def seal_block(self, block: bytearray, address: bytes) -> bytes | bytearray:
        return block

    def open_block(self, stored: memoryview, address: bytes) -> bytearray | None:
        return bytearray(stored) if digest(stored) == address else None

    def seal_part(self, salt: bytes, label: bytes, contents: bytes, bound: bytes = b"") -> bytes:
        return contents

    def open_part(self, salt: bytes, label: bytes, stored: memoryview | bytes, bound: bytes = b"") -> memoryview | None:
        return memoryview(stored)


PLAIN: Sealing = _Plain()
"""Sealing of images that are not encrypted."""


class Domain:
    """Key domain. Raises UnsupportedError if a package of the extra `stores` is missing."""

    overhead = TAG

    def __init__(self, secret: bytes) -> None:
        """`secret`: key of the domain, 32 bytes."""
        self.secret = secret
        self.domain = derived_key(secret, b"domain")
        self._addresses = derived_key(secret, b"addresses")
        self._blocks = derived_key(secret, b"blocks")
        self._parts = derived_key(secret, b"parts")

    @classmethod
    def create(cls) -> Domain:
        """Return a new domain."""
        return cls(os.urandom(KEY))

    @functools.cached_property
    def _recipients(self) -> bytes:
        return derived_key(self.secret, b"recipients")

    def fingerprint(self, recipients: bytes) -> bytes:
        """Return the keyed digest of the recipients of the domain."""
        return keyed_digest(recipients, self._recipients)

    def address(self, block: bytes | bytearray | memoryview) -> bytes:
        """Return the content address of a storage block in normal form, 32 bytes."""
        return keyed_digest(block, self._addresses)

    def block_key(self, address: bytes) -> bytes:
        """Return the key of the storage block with this address."""
        return keyed_digest(address, self._blocks)

    def seal_block(self, block: bytearray, address: bytes) -> bytes | bytearray:
        """Return a storage block as it is stored in a pack."""
        bound = _bound(self.domain, address, len(block))
        return Aead(self.block_key(address)).encrypt(_NONCE, block, bound)

    def open_block(self, stored: memoryview, address: bytes) -> bytearray | None:
        """Return the contents of a stored block; None unless it is the block with this address."""
        return _opened(self.block_key(address), self.domain, stored, address)

    def seal_part(self, salt: bytes, label: bytes, contents: bytes, bound: bytes = b"") -> bytes:
        """Return a part of a manifest or of a reference as it is stored. `salt` is random, and `label` differs between
        the parts with the same salt."""
        return Aead(derived_key(self._parts, label, salt)).encrypt(_NONCE, contents, bound)

    def open_part(self, salt: bytes, label: bytes, stored: memoryview | bytes, bound: bytes = b"") -> memoryview | None:
        """Return the contents of a stored part; None if it, its label or its associated data are not those of
        `seal_part`."""
        contents = bytearray(max(len(stored) - TAG, 0))
        opened = Aead(derived_key(self._parts, label, salt)).decrypt_into(_NONCE, stored, bound, contents)
        return memoryview(contents).toreadonly() if opened else None


class BlockKeys:
    """Keys of some storage blocks of a domain, without the key of the domain."""

    def __init__(self, domain: bytes, keys: Mapping[bytes, bytes]) -> None:
        """`domain`: identifier of the domain; `keys`: keys by the addresses of the blocks."""
        self._domain = domain
        self._keys = keys

    def open_block(self, stored: memoryview, address: bytes) -> bytearray | None:
        """Return the contents of a stored block; None unless it is the block with this address, and its key is
        known."""
        key = self._keys.get(address)
        return None if key is None else _opened(key, self._domain, stored, address)


def _opened(key: bytes, domain: bytes, stored: memoryview, address: bytes) -> bytearray | None:
    """Decrypt a stored block. Return None unless it is the block with this address."""
    if len(stored) < TAG:
        return None
    block = bytearray(len(stored) - TAG)
    return block if Aead(key).decrypt_into(_NONCE, stored, _bound(domain, address, len(block)), block) else None


def _bound(domain: bytes, address: bytes, length: int) -> bytes:
    """Return the associated data of a storage block."""
    return domain + address + length.to_bytes(8, "little")
