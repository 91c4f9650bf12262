"""The bytes of a chunk give back what was put in, or say that they are damaged."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feature_store.chunks import canonical_bytes, decode_chunks, encode_chunks
from feature_store.errors import ChunkCorruptError
from feature_store.interactions import COLUMN_DTYPES


def random_columns(num_rows: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    return {
        name: random.integers(0, 256, num_rows * dtype.itemsize, np.uint8).view(dtype)
        for name, dtype in COLUMN_DTYPES.items()
    }


def assert_same_bits(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    for name, column in expected.items():
        assert found[name].dtype == column.dtype
        assert found[name].tobytes() == column.tobytes(), name


@given(st.lists(st.integers(0, 19), max_size=8), st.integers(0, 2**32), st.integers(0, 8))
def test_every_bit_survives_in_chunks_of_any_length(lengths: list[int], seed: int, num_without_surfaces: int) -> None:
    columns = random_columns(sum(lengths), seed)
    columns["surface"][: sum(lengths[:num_without_surfaces])] = 0
    sizes = np.array(lengths, np.int64)
    payloads = encode_chunks(columns, sizes)
    assert_same_bits(decode_chunks(payloads, sizes, sizes, sizes), columns)


@pytest.mark.parametrize(("surface", "version"), [(0, b"\x01"), (7, b"\x02")])
def test_the_format_is_the_documented_one(surface: int, version: bytes) -> None:
    columns = {name: np.array([3], dtype) for name, dtype in COLUMN_DTYPES.items()}
    (payload,) = encode_chunks(columns | {"surface": np.array([surface], np.uint8)}, np.array([1]))
    wide, narrow = (3).to_bytes(8, "little"), (3).to_bytes(4, "little")
    header = version + b"\0\0\0" + (1).to_bytes(4, "little")
    canonical = header + 3 * wide + narrow + np.float32(3).tobytes()
    if surface:
        canonical += bytes([surface]) + bytes(7)
    num_bytes = canonical_bytes(1, has_surfaces=surface > 0)
    assert payload[:num_bytes] == canonical
    assert payload[num_bytes:-4] == wide + narrow


def test_a_chunk_without_surfaces_takes_no_room_for_them_beside_one_with() -> None:
    columns = random_columns(20) | {"surface": np.repeat(np.array([0, 1], np.uint8), 10)}
    plain, told = encode_chunks(columns, np.array([10, 10]))
    assert (len(plain), len(told)) == (8 + 44 * 10 + 8, 8 + 44 * 10 + 16 + 8)


def test_a_chunk_of_one_version_does_not_pass_for_the_other() -> None:
    """Its size says one, its header the other, and its checksum is right."""
    for surface, claimed in ((0, 2), (5, 1)):
        columns = random_columns(8) | {"surface": np.full(8, surface, np.uint8)}
        (payload,) = encode_chunks(columns, np.array([8]))
        forged = bytes([claimed]) + payload[1:-4]
        forged += zlib.crc32(forged).to_bytes(4, "little")
        with pytest.raises(ChunkCorruptError, match="it is not of format version"):
            decode_chunks([forged], np.array([8]), np.array([1]), np.array([0]))


def test_arrival_columns_change_nothing_before_them() -> None:
    columns = random_columns(5)
    other = columns | {"seq": columns["seq"] + np.uint32(1), "arrival_ms": columns["arrival_ms"] + 1}
    (first,), (second,) = encode_chunks(columns, np.array([5])), encode_chunks(other, np.array([5]))
    assert first != second
    num_bytes = canonical_bytes(5, has_surfaces=True)
    assert first[:num_bytes] == second[:num_bytes]


@pytest.mark.parametrize("byte", [0, 5, 8, 100, -5, -1])
def test_one_changed_byte_is_noticed_and_names_user_and_chunk(byte: int) -> None:
    payloads = encode_chunks(random_columns(7), np.array([3, 4]))
    damaged = bytearray(payloads[1])
    damaged[byte] ^= 1
    with pytest.raises(ChunkCorruptError, match="history chunk 9 of user 42 is corrupt") as error:
        decode_chunks([payloads[0], bytes(damaged)], np.array([3, 4]), np.array([41, 42]), np.array([8, 9]))
    assert (error.value.user_id, error.value.chunk_no) == (42, 9)


def test_a_truncated_chunk_is_noticed() -> None:
    told = random_columns(4)
    for columns in (told, told | {"surface": np.zeros(4, np.uint8)}):
        (payload,) = encode_chunks(columns, np.array([4]))
        for damaged in (payload[:-8], payload[:-4], b"", payload + bytes(8), payload + bytes(16)):
            with pytest.raises(ChunkCorruptError):
                decode_chunks([damaged], np.array([4]), np.array([1]), np.array([0]))


def test_a_row_that_miscounts_its_chunk_is_noticed() -> None:
    (payload,) = encode_chunks(random_columns(4), np.array([4]))
    with pytest.raises(ChunkCorruptError):
        decode_chunks([payload], np.array([5]), np.array([1]), np.array([0]))
