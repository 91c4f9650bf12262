"""The store can be counted and looked over; whatever is planted in it is found, and the finding says where."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from feature_store.chunks import encode_chunks
from feature_store.config import FeatureStoreConfig
from feature_store.engine import build_engine, writing
from feature_store.errors import StoreLayoutError
from feature_store.records import AuditTotals, Finding
from feature_store.store import FeatureStore
from tests.feature_store.truth import Row, append, batch

LENGTHS = {3: 10, 5: 4, 9: 1}
"""Interactions of each user, in chunks of four."""


@pytest.fixture
def filled(store: FeatureStore) -> FeatureStore:
    """Three users, whose interactions arrived in another order than they happened; one position."""
    rows = [Row(user, 1_000 + 10 * number, number) for user, length in LENGTHS.items() for number in range(length)]
    for number in np.random.default_rng(0).permutation(len(rows)).tolist():
        append(store, [rows[number]])
    with store.transaction() as transaction:
        transaction.lock_position("main", "interactions", 0)
        transaction.set_position("main", "interactions", 0, 15)
    return store


def execute(store: FeatureStore, statement: str, **values: Any) -> None:
    engine = build_engine(FeatureStoreConfig(url=store.config.url))
    with writing(engine) as connection:
        assert connection.execute(text(statement), values).rowcount == 1
    engine.dispose()


def payload_of(store: FeatureStore, user_id: int, chunk_no: int) -> bytes:
    engine = build_engine(FeatureStoreConfig(url=store.config.url))
    query = "SELECT payload FROM history_chunk WHERE user_id = :user_id AND chunk_no = :chunk_no"
    with writing(engine) as connection:
        found = connection.execute(text(query), {"user_id": user_id, "chunk_no": chunk_no}).scalar_one()
    engine.dispose()
    return bytes(found)


def replace_payload(store: FeatureStore, user_id: int, chunk_no: int, payload: bytes) -> None:
    statement = "UPDATE history_chunk SET payload = :payload WHERE user_id = :user_id AND chunk_no = :chunk_no"
    execute(store, statement, payload=payload, user_id=user_id, chunk_no=chunk_no)


def findings_in(store: FeatureStore) -> list[Finding]:
    findings: list[Finding] = []
    store.verify(findings.append)
    return findings


def content(times: list[int], keys: list[int], seqs: list[int], items: list[int] | None = None) -> bytes:
    rows = batch(
        [
            Row(0, time_ms, key, item_id=7 if items is None else items[place], seq=seqs[place])
            for place, (time_ms, key) in enumerate(zip(times, keys, strict=True))
        ]
    )
    (payload,) = encode_chunks(rows.columns, np.array([len(times)]))
    return payload


def test_an_untouched_store_has_no_findings(filled: FeatureStore) -> None:
    findings: list[Finding] = []
    totals = filled.verify(findings.append)
    assert findings == []
    assert totals == AuditTotals(num_users=3, num_chunks=5, num_interactions=15, num_positions=1, num_vectors=0)


def test_an_empty_store_has_no_findings_and_counts_nothing(store: FeatureStore) -> None:
    assert findings_in(store) == []
    assert (store.stats().num_users, store.stats().num_bytes, store.stats().positions) == (0, 0, {})


def test_statistics_count_users_interactions_chunks_bytes_and_positions(filled: FeatureStore) -> None:
    stats = filled.stats()
    assert (stats.num_users, stats.num_interactions, stats.num_chunks) == (3, 15, 5)
    chunks = [(3, 0), (3, 1), (3, 2), (5, 0), (9, 0)]
    assert stats.num_bytes == sum(len(payload_of(filled, *chunk)) for chunk in chunks)
    assert stats.positions == {"main": {"interactions": {0: 15}}}


def test_of_more_chunks_than_are_looked_at_together_none_is_left_out(open_store: Callable[..., FeatureStore]) -> None:
    store = open_store(chunk_len=1)
    for part in np.array_split(np.random.default_rng(1).permutation(2_400), 4):
        append(store, [Row(int(number) % 30, 1_000 + int(number), int(number)) for number in part])
    findings: list[Finding] = []
    totals = store.verify(findings.append)
    assert (findings, totals.num_users, totals.num_chunks) == ([], 30, 2_400)
    for user_id in (0, 13, 29):
        replace_payload(store, user_id, 79, b"")
    assert [(finding.user_id, finding.chunk_no) for finding in findings_in(store)] == [(0, 79), (13, 79), (29, 79)]


CHANGES = {
    "n": ("its row says that it holds 3 interactions; it must hold exactly 4, since others follow it", 3),
    "first_ms": ("first_ms is 3, its content says 1000", 3),
    "last_ms": ("last_ms is 3, its content says 1030", 3),
    "next_seq": ("next_seq is 300, but the tail's is 10", 300),
}


@pytest.mark.parametrize("column", CHANGES)
def test_a_row_that_contradicts_its_content_is_found(filled: FeatureStore, column: str) -> None:
    problem, value = CHANGES[column]
    execute(filled, f"UPDATE history_chunk SET {column} = :value WHERE user_id = 3 AND chunk_no = 0", value=value)
    assert Finding(problem, user_id=3, chunk_no=0) in findings_in(filled)
    assert {(finding.user_id, finding.chunk_no) for finding in findings_in(filled)} <= {(3, 0), (3, 2)}


def test_a_lost_chunk_is_found(filled: FeatureStore) -> None:
    execute(filled, "DELETE FROM history_chunk WHERE user_id = 3 AND chunk_no = 1")
    assert findings_in(filled) == [
        Finding("chunk 1 should come before it and is missing", user_id=3, chunk_no=2),
        Finding("next_seq is 10, but the user's chunks hold 6 interactions", user_id=3, chunk_no=2),
    ]


def test_a_lost_tail_and_a_lost_head_are_found(filled: FeatureStore) -> None:
    execute(filled, "DELETE FROM history_chunk WHERE user_id = 3 AND chunk_no = 2")
    assert {(finding.user_id, finding.chunk_no) for finding in findings_in(filled)} >= {(3, 1)}
    execute(filled, "DELETE FROM history_chunk WHERE user_id = 3 AND chunk_no = 0")
    assert Finding("chunk 0 should come before it and is missing", user_id=3, chunk_no=1) in findings_in(filled)


def test_flipped_bits_are_found_wherever_they_are(filled: FeatureStore) -> None:
    whole = payload_of(filled, 3, 1)
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        replace_payload(filled, 3, 1, bytes(damaged))
        assert [(f.user_id, f.chunk_no) for f in findings_in(filled)] == [(3, 1)]


@pytest.mark.parametrize("cut", [b"", b"x", None])
def test_bytes_of_another_size_are_found_and_hide_nothing_else(filled: FeatureStore, cut: bytes | None) -> None:
    replace_payload(filled, 5, 0, payload_of(filled, 5, 0) + b"\0" if cut is None else cut)
    replace_payload(filled, 3, 2, b"")
    problem = "its size does not fit its number of interactions"
    assert findings_in(filled) == [Finding(problem, user_id=3, chunk_no=2), Finding(problem, user_id=5, chunk_no=0)]


def test_bytes_that_are_not_canonical_are_found_although_their_checksum_fits(filled: FeatureStore) -> None:
    padded = bytearray(payload_of(filled, 5, 0))
    padded[-5] = 1  # four interactions: zeros fill the word before the checksum
    padded[-4:] = zlib.crc32(padded[:-4]).to_bytes(4, "little")
    replace_payload(filled, 5, 0, bytes(padded))
    problem = "its bytes are not the canonical encoding of its content"
    assert findings_in(filled) == [Finding(problem, user_id=5, chunk_no=0)]


UNORDERED = "an interaction is out of (event time, event key) order or there twice"
TIMES = [1_000, 1_010, 1_020, 1_030]


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (lambda: content([1_000, 1_020, 1_010, 1_030], [0, 1, 2, 3], [0, 1, 2, 3]), UNORDERED),
        (lambda: content([1_000, 1_020, 1_020, 1_030], [0, 2, 1, 3], [0, 1, 2, 3]), UNORDERED),
        (lambda: content([1_000, 1_010, 1_010, 1_030], [0, 1, 1, 3], [0, 1, 2, 3]), UNORDERED),
        (lambda: content(TIMES, [0, 1, 2, 3], [0, 1, 2, 4]), "an arrival number is not below its next_seq"),
        (lambda: content(TIMES, [0, 1, 2, 3], [0, 1, 2, 2]), "an arrival number is there twice"),
        (lambda: content(TIMES, [0, 1, 2, 3], [0, 1, 2, 3], [7, 7, -7, 7]), "an item id is negative"),
    ],
)
def test_well_formed_bytes_with_impossible_content_are_found(
    filled: FeatureStore, payload: Callable[[], bytes], problem: str
) -> None:
    replace_payload(filled, 5, 0, payload())
    assert findings_in(filled) == [Finding(problem, user_id=5, chunk_no=0)]


def test_two_chunks_in_the_wrong_order_are_found(filled: FeatureStore) -> None:
    first, second = payload_of(filled, 3, 0), payload_of(filled, 3, 1)
    replace_payload(filled, 3, 0, second)
    replace_payload(filled, 3, 1, first)
    assert Finding(UNORDERED, user_id=3, chunk_no=1) in findings_in(filled)


def test_a_tail_that_counts_wrongly_is_found(filled: FeatureStore) -> None:
    execute(filled, "UPDATE history_chunk SET next_seq = 2 WHERE user_id = 9")
    (finding,) = findings_in(filled)
    assert finding.sentence() == "user 9 chunk 0: next_seq is 2, but the user's chunks hold 1 interactions"


def test_a_chunk_without_interactions_is_found(filled: FeatureStore) -> None:
    execute(filled, "UPDATE history_chunk SET n = 0, payload = :payload WHERE user_id = 9", payload=content_of_none())
    problem = "it is empty, but retention has removed nothing from this store"
    assert findings_in(filled) == [Finding(problem, user_id=9, chunk_no=0)]


def content_of_none() -> bytes:
    (payload,) = encode_chunks(batch([]).columns, np.array([0]))
    return payload


def test_a_negative_position_is_found(filled: FeatureStore) -> None:
    execute(filled, "UPDATE log_position SET next_offset = -2")
    (finding,) = findings_in(filled)
    assert finding.sentence() == "position of interactions/0 in log 'main' is -2: it is negative"


def test_another_chunk_length_is_refused(filled: FeatureStore, open_store: Callable[..., FeatureStore]) -> None:
    with pytest.raises(StoreLayoutError, match="chunk_len=4"):
        open_store(chunk_len=8).verify(print)
