"""Encryption of storage blocks and of parts of manifests: round trips, changes, and uniqueness of keys and nonces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import ImageError
from pageferry.stores import blocks, library
from pageferry.stores.blocks import BlockRecord
from pageferry.stores.sealing import PLAIN, TAG, BlockKeys, Domain

pytest.importorskip("pyrage", reason="the extra `stores` is not installed")

DOMAIN, OTHER = Domain(bytes(range(32))), Domain(bytes(32))


@given(st.binary(max_size=1000))
def test_block_is_decrypted_under_its_address_and_domain_only(contents: bytes) -> None:
    address = DOMAIN.address(contents)
    stored = memoryview(DOMAIN.seal_block(bytearray(contents), address))
    assert len(stored) == len(contents) + TAG
    opened = DOMAIN.open_block(stored, address)
    assert opened is not None
    assert bytes(opened) == contents
    assert DOMAIN.open_block(stored, DOMAIN.address(contents + b"x")) is None
    assert OTHER.open_block(stored, address) is None
    assert OTHER.address(contents) != address != library.digest(contents)


def test_keys_of_blocks_open_these_blocks_only() -> None:
    mine, other = DOMAIN.address(b"mine"), DOMAIN.address(b"other")
    keys = BlockKeys(DOMAIN.domain, {mine: DOMAIN.block_key(mine)})
    opened = keys.open_block(memoryview(DOMAIN.seal_block(bytearray(b"mine"), mine)), mine)
    assert opened is not None
    assert bytes(opened) == b"mine"
    stored = memoryview(DOMAIN.seal_block(bytearray(b"other"), other))
    assert keys.open_block(stored, other) is None
    assert keys.open_block(stored, mine) is None


@given(st.data())
def test_changed_block_is_refused(data: st.DataObject) -> None:
    contents = data.draw(st.binary(min_size=1, max_size=300))
    address = DOMAIN.address(contents)
    stored = bytearray(DOMAIN.seal_block(bytearray(contents), address))
    stored[data.draw(st.integers(0, len(stored) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert DOMAIN.open_block(memoryview(stored), address) is None
    assert DOMAIN.open_block(memoryview(stored)[: data.draw(st.integers(0, len(stored) - 1))], address) is None


@given(st.data())
def test_part_is_decrypted_with_its_salt_label_and_associated_data_only(data: st.DataObject) -> None:
    contents, bound = data.draw(st.binary(max_size=300)), data.draw(st.binary(max_size=50))
    salt = bytes(32)
    stored = DOMAIN.seal_part(salt, b"frame", contents, bound)
    assert bytes(DOMAIN.open_part(salt, b"frame", stored, bound) or b"") == contents
    changed = bytearray(stored)
    changed[data.draw(st.integers(0, len(stored) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for attempt in (
        DOMAIN.open_part(salt, b"frame", bytes(changed), bound),
        DOMAIN.open_part(salt, b"frame", stored[:-1], bound),
        DOMAIN.open_part(salt, b"frame", b"", bound),
        DOMAIN.open_part(salt, b"table", stored, bound),
        DOMAIN.open_part(bytes(31) + b"x", b"frame", stored, bound),
        DOMAIN.open_part(salt, b"frame", stored, bound + b"x"),
        OTHER.open_part(salt, b"frame", stored, bound),
    ):
        assert attempt is None


@given(st.sets(st.binary(max_size=100), min_size=2, max_size=20))
def test_no_key_and_nonce_encrypt_two_different_blocks(contents: set[bytes]) -> None:
    used: dict[tuple[bytes, bytes], bytes] = {}

    class Recorder(library.Aead):
        def __init__(self, key: bytes) -> None:
            super().__init__(key)
            self.key = key

        def encrypt(self, nonce: bytes, data: bytes | bytearray, bound: bytes) -> bytes:
            assert used.setdefault((self.key, nonce), bytes(data)) == data
            return super().encrypt(nonce, data, bound)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pageferry.stores.sealing.Aead", Recorder)
        for one in [*contents, *contents]:
            for domain in (DOMAIN, OTHER):
                domain.seal_block(bytearray(one), domain.address(one))
    assert len(used) == 2 * len(contents)


def test_block_of_another_length_or_kind_is_refused() -> None:
    contents = bytes(1000)
    address = DOMAIN.address(contents)
    sealed = memoryview(DOMAIN.seal_block(bytearray(contents), address))
    record = BlockRecord(address, bytes(8), 0, 1000, 0, 0, blocks.SEALED)
    assert blocks.restore(sealed, record, 0, DOMAIN) == contents
    assert (record.stored, record._replace(flags=0).stored) == (1000 + TAG, 1000)
    for stored, changed, sealing in (
        (sealed[:-1], record, DOMAIN),
        (sealed, record._replace(length=999), DOMAIN),
        (sealed, record, OTHER),
        (sealed, record, PLAIN),
        (memoryview(contents), record._replace(flags=0), DOMAIN),
        (memoryview(contents), record._replace(flags=0, digest=library.digest(contents)), DOMAIN),
    ):
        with pytest.raises(ImageError, match="storage block 5 does not match its digest"):
            blocks.restore(stored, changed, 5, sealing)


@pytest.mark.parametrize(("flags", "sealed"), [(blocks.SEALED, 0), (0, blocks.SEALED), (4, 0), (6, blocks.SEALED)])
def test_tables_do_not_mix_encrypted_and_plain_blocks(flags: int, sealed: int) -> None:
    table = blocks.encode_table([BlockRecord(bytes(32), bytes(8), 4096, 100, 0, 64, flags)])
    with pytest.raises(ImageError, match=f"unknown flags {flags:#x}"):
        blocks.decode_table(memoryview(table), 1, [1 << 20], 1 << 20, sealed)


def test_encrypted_block_must_be_in_its_pack_with_its_tag() -> None:
    record = BlockRecord(bytes(32), bytes(8), 4096, 100, 0, 64, blocks.SEALED)
    table = memoryview(blocks.encode_table([record]))
    assert blocks.decode_table(table, 1, [180], 1 << 20, blocks.SEALED) == [record]
    with pytest.raises(ImageError, match="not in a pack"):
        blocks.decode_table(table, 1, [179], 1 << 20, blocks.SEALED)
