"""The bytes of a stored chunk: versioned, columnar, little-endian, with a checksum.

Format version 1, for a chunk of n interactions (every column is aligned, so a batch of chunks decodes in one pass):

    version u8 = 1 · zero u8[3] · n u32
    event_time_ms i64[n] · event_key u64[n] · item_id i64[n] · action u32[n] · value f32[n]    a function of the events
    arrival_ms i64[n] · seq u32[n]                                                             depends on arrival order
    zero u32 (only if n is even) · crc32 u32 of every byte before it

Format version 2, of a chunk in which a surface was told: the same, and before arrival_ms

    surface u8[n] · zero u8 up to a multiple of 8 bytes                                        a function of the events

Which version a chunk has is decided by its content alone, and can be told from its size. Encoding and decoding work on
whole batches of chunks of either version; only the checksums are taken chunk by chunk.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_store.errors import ChunkCorruptError
from feature_store.interactions import COLUMN_DTYPES, Columns
from feature_store.jagged import concat_ranges, offsets_of

FORMAT_VERSION: Final = 1
SURFACE_VERSION: Final = 2
"""With the column `surface`."""

CHECKSUM_RESIDUE: Final = 0x2144DF1C
"""crc32 of any bytes followed by their own crc32 (little-endian): one call verifies a payload."""

_U64: Final = np.dtype("<u8")
_U32: Final = np.dtype("<u4")
_HEADER_BYTES: Final = 8
_MAX_ENCODED_LEN: Final = 2**32 - 1

# Each column starts this many 8-byte words per interaction after the header (4-byte columns: half words); those after
# the surfaces, as many words later as these take.
_WIDE_COLUMN_STARTS: Final = {"event_time_ms": 0, "event_key": 1, "item_id": 2, "arrival_ms": 4}
_NARROW_COLUMN_STARTS: Final = {"action": 6, "value": 7, "seq": 10}
_SURFACE_START: Final = 4


def canonical_bytes(num_interactions: int, *, has_surfaces: bool = False) -> int:
    """Length of the payload's prefix that is a function of the events alone: all but the arrival columns and crc."""
    return _HEADER_BYTES + 32 * num_interactions + (-(-num_interactions // 8) * 8 if has_surfaces else 0)


def encode_chunks(columns: Columns, lengths: NDArray[np.int64]) -> list[bytes]:
    """Encode C consecutive chunks.

    Args:
        columns: the chunks' interactions back to back, T rows.
        lengths: i64[C], interactions per chunk; they sum to T.

    Returns:
        The C payloads.
    """
    if len(lengths) == 0:
        return []
    assert lengths.min() >= 0
    assert lengths.max() <= _MAX_ENCODED_LEN
    surface_words = _surface_words(columns["surface"], lengths)
    offsets = offsets_of(_payload_words(lengths) + surface_words)
    words = np.zeros(offsets[-1], _U64)
    half_words = words.view(_U32)
    words[offsets[:-1]] = _headers(lengths, surface_words)
    if (told := surface_words > 0).any():
        index = _surface_index(offsets[:-1][told], lengths[told])
        words.view(np.uint8)[index] = columns["surface"][np.repeat(told, lengths)]
    for name, index in _column_indices(offsets[:-1], lengths, surface_words):
        if name in _WIDE_COLUMN_STARTS:
            words[index] = columns[name].view(np.uint64)
        else:
            half_words[index] = columns[name].view(np.uint32)
    buffer = words.view(np.uint8).data
    bounds = (8 * offsets).tolist()
    spans = list(pairwise(bounds))
    half_words[2 * offsets[1:] - 1] = [zlib.crc32(buffer[start : end - 4]) for start, end in spans]
    return [bytes(buffer[start:end]) for start, end in spans]


def decode_chunks(
    payloads: Sequence[bytes],
    lengths: NDArray[np.int64],
    user_ids: NDArray[np.int64],
    chunk_nos: NDArray[np.int64],
) -> dict[str, NDArray[Any]]:
    """Decode C payloads into the columns of all their interactions, back to back.

    Args:
        payloads: C payloads.
        lengths: i64[C], interactions per chunk as their rows say.
        user_ids: i64[C], whose chunks they are (for the error).
        chunk_nos: i64[C], which chunks they are (for the error).

    Raises:
        ChunkCorruptError: a payload has the wrong size, version or checksum.
    """
    if len(payloads) == 0:
        return {name: np.empty(0, dtype) for name, dtype in COLUMN_DTYPES.items()}
    num_words = _payload_words(lengths)
    sizes = np.fromiter(map(len, payloads), np.int64, len(payloads))
    checksums = np.fromiter(map(zlib.crc32, payloads), np.uint32, len(payloads))
    told = sizes > 8 * num_words
    surface_words = np.where(told, _words_of_bytes(lengths), 0)
    num_words = num_words + surface_words
    _refuse_bad(sizes != 8 * num_words, "its size does not fit its number of interactions", user_ids, chunk_nos)
    _refuse_bad(checksums != CHECKSUM_RESIDUE, "its checksum does not match its bytes", user_ids, chunk_nos)
    words = np.frombuffer(b"".join(payloads), _U64)
    half_words = words.view(_U32)
    starts = offsets_of(num_words)[:-1]
    is_other = words[starts] != _headers(lengths, surface_words)
    _refuse_bad(is_other, f"it is not of format version {FORMAT_VERSION} or {SURFACE_VERSION}", user_ids, chunk_nos)
    columns: dict[str, NDArray[Any]] = {"surface": np.zeros(lengths.sum(), np.uint8)}
    if told.any():
        index = _surface_index(starts[told], lengths[told])
        columns["surface"][np.repeat(told, lengths)] = words.view(np.uint8)[index]
    for name, index in _column_indices(starts, lengths, surface_words):
        if name in _WIDE_COLUMN_STARTS:
            columns[name] = words[index].astype(np.uint64, copy=False).view(COLUMN_DTYPES[name])
        else:
            columns[name] = half_words[index].astype(np.uint32, copy=False).view(COLUMN_DTYPES[name])
    return columns


def _payload_words(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    # Header, five words an interaction, then seq and crc as half words, padded to a whole word.
    return 1 + 5 * lengths + (lengths + 2) // 2


def _words_of_bytes(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    words: NDArray[np.int64] = (lengths + 7) // 8
    return words


def _surface_words(surface: NDArray[np.uint8], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """i64[C], words that the surfaces of each chunk take: none where none was told."""
    if not surface.any():
        return np.zeros(len(lengths), np.int64)
    chunk = np.repeat(np.arange(len(lengths)), lengths)
    is_told = np.bincount(chunk, weights=surface, minlength=len(lengths)) > 0
    return np.where(is_told, _words_of_bytes(lengths), 0)


def _headers(lengths: NDArray[np.int64], surface_words: NDArray[np.int64]) -> NDArray[np.uint64]:
    version = np.where(surface_words > 0, SURFACE_VERSION, FORMAT_VERSION).astype(np.uint64)
    headers: NDArray[np.uint64] = lengths.astype(np.uint64) << np.uint64(32) | version
    return headers


def _surface_index(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the surfaces of chunks starting at these words lie, in bytes."""
    return concat_ranges(8 * (starts + 1 + _SURFACE_START * lengths), lengths)


def _column_indices(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], surface_words: NDArray[np.int64]
) -> list[tuple[str, NDArray[np.int64]]]:
    """Where each interaction of chunks starting at these words lies: per column, in words or half words."""
    wide = concat_ranges(starts + 1, lengths)
    narrow = concat_ranges(2 * starts + 2, lengths)
    stride = np.repeat(lengths, lengths)
    found = [(name, wide + k * stride) for name, k in _WIDE_COLUMN_STARTS.items()] + [
        (name, narrow + k * stride) for name, k in _NARROW_COLUMN_STARTS.items()
    ]
    if surface_words.any():
        later = np.repeat(surface_words, lengths)
        words = {"arrival_ms": later, "seq": 2 * later}
        return [(name, index + words[name] if name in words else index) for name, index in found]
    return found


def _refuse_bad(
    is_bad: NDArray[np.bool_], problem: str, user_ids: NDArray[np.int64], chunk_nos: NDArray[np.int64]
) -> None:
    if is_bad.any():
        first = int(np.argmax(is_bad))
        raise ChunkCorruptError(int(user_ids[first]), int(chunk_nos[first]), problem)
