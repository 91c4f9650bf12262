"""Stable numbers for strings: hashed user and item ids, and the 64-bit key of an event id.

These values are stored and sent between processes, so the functions may never change: `tests/feature_store/test_ids.py`
pins their values.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray

_HASH_BYTES = 8
_ID_MAX: Final = 2**63 - 1
_ID_DIGITS_MAX: Final = len(str(_ID_MAX))


def stable_id(text: str) -> int:
    """The id of a user or item named by a string: 63 bits of BLAKE2b, so it fits a signed 64-bit column and is ≥ 0."""
    return int.from_bytes(blake2b(text.encode(), digest_size=_HASH_BYTES, person=b"headrace-id").digest(), "big") >> 1


def numeric_id(text: str) -> int | None:
    """The id that decimal digits name, up to 2^63 - 1; None where they name none, or are no digits."""
    # The length first: of many thousand digits Python makes no number.
    is_number = len(text) <= _ID_DIGITS_MAX and text.isascii() and text.isdigit()
    return int(text) if is_number and int(text) <= _ID_MAX else None


def event_key(event_id: str) -> int:
    """The identity of an event within its user's history and time: 64 unsigned bits of BLAKE2b of its `event_id`."""
    return int.from_bytes(blake2b(event_id.encode(), digest_size=_HASH_BYTES, person=b"headrace-event").digest(), "big")


def event_keys(event_ids: Iterable[str]) -> NDArray[np.uint64]:
    """`event_key` of every id, as u64[N]."""
    # Copying a prepared hash takes half the time of making one.
    prepared = blake2b(digest_size=_HASH_BYTES, person=b"headrace-event")
    digests = []
    for event_id in event_ids:
        digest = prepared.copy()
        digest.update(event_id.encode())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
