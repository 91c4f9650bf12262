"""`headrace store`: counts for a person and a program, and damage that is named with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text

from feature_store.config import FeatureStoreConfig
from feature_store.engine import build_engine, writing
from feature_store.store import FeatureStore
from feature_store.user_states import NewVectors
from tests.feature_store.databases import migrated_database
from tests.feature_store.truth import Row, append
from tests.ops.command_line import Headrace, assert_refused


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Two users with 100 interactions each, in chunks of 64, and two positions."""
    with migrated_database(request.param, tmp_path) as url:
        store = FeatureStore(FeatureStoreConfig(url=url))
        append(store, [Row(number % 2, 1_000 + number, number) for number in range(200)])
        with store.transaction() as transaction:
            for partition in (0, 1):
                transaction.lock_position("main", "interactions", partition)
            transaction.set_position("main", "interactions", 1, 200)
        store.close()
        yield url


def damage(url: str, statement: str) -> None:
    engine = build_engine(FeatureStoreConfig(url=url))
    with writing(engine) as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_stats_count_and_print_positions(headrace: Headrace, url: str) -> None:
    ran = headrace("store", "stats", HEADRACE_STORE__URL=url)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = [line.split(maxsplit=1) for line in ran.stdout.splitlines()]
    assert lines[:3] == [["users", "2"], ["interactions", "200"], ["chunks", "4"]]
    assert lines[4] == ["position", "log 'main' interactions 0:0, 1:200"]
    stats = json.loads(headrace("store", "stats", "--json", HEADRACE_STORE__URL=url).stdout)
    assert (stats["num_users"], stats["num_interactions"], stats["num_chunks"]) == (2, 200, 4)
    assert stats["positions"] == {"main": {"interactions": {"0": 0, "1": 200}}}


def test_a_whole_store_is_verified(headrace: Headrace, url: str) -> None:
    ran = headrace("store", "verify", HEADRACE_STORE__URL=url)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == "2 users, 4 chunks, 200 interactions, 2 positions, 0 vectors: nothing is wrong\n"


def test_vectors_of_users_are_counted_by_version_and_verified(headrace: Headrace, url: str) -> None:
    store = FeatureStore(FeatureStoreConfig(url=url))
    with store.transaction() as transaction:
        states = transaction.user_states
        for version, count in ((1, 2), (2, 1)):
            states.begin_version("default", version, created_at_ms=0)
            new = NewVectors(
                user_id=np.arange(count),
                next_seq=np.full(count, 100),
                as_of_ms=np.full(count, 1_000),
                vector=np.ones((count, 4), np.float32),
            )
            states.write("default", version, new, written_at_ms=version)
        states.serve_version("default", 1, from_ms=1)
    store.close()
    lines = headrace("store", "stats", HEADRACE_STORE__URL=url).stdout.splitlines()
    assert "vectors       model 'default' 2 of version 1 (in effect), 1 of version 2" in lines
    stats = json.loads(headrace("store", "stats", "--json", HEADRACE_STORE__URL=url).stdout)
    assert (stats["vectors"], stats["upstream_versions"]) == ({"default": {"1": 2, "2": 1}}, {"default": 1})
    assert "2 positions, 3 vectors: nothing is wrong" in headrace("store", "verify", HEADRACE_STORE__URL=url).stdout
    damage(url, "UPDATE user_state SET next_seq = 101 WHERE user_id = 1")
    binary = "BYTEA" if url.startswith("postgresql") else "BLOB"
    damage(url, f"UPDATE user_state SET vector = CAST('torn' AS {binary}) WHERE user_id = 0 AND version = 2")
    ran = headrace("store", "verify", HEADRACE_STORE__URL=url)
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[:2] == [
        "user 0: the vector of version 2 below 100 for model 'default' is damaged",
        "user 1: the vector of version 1 below 101 for model 'default' knows more than the 100 arrivals there are",
    ]


def test_damage_is_named_with_its_place_and_status_1(headrace: Headrace, url: str) -> None:
    damage(url, "UPDATE history_chunk SET last_ms = 7 WHERE user_id = 1 AND chunk_no = 1")
    damage(url, "UPDATE log_position SET next_offset = -5 WHERE partition = 1")
    ran = headrace("store", "verify", HEADRACE_STORE__URL=url)
    assert ran.returncode == 1
    chunk, position, verdict = ran.stdout.splitlines()
    assert chunk == "user 1 chunk 1: last_ms is 7, its content says 1199"
    assert position == "position of interactions/1 in log 'main' is -5: it is negative"
    assert verdict.endswith(": 2 findings")


def test_what_has_expired_is_pruned_and_accounted(headrace: Headrace, url: str) -> None:
    ran = headrace("store", "prune", HEADRACE_STORE__URL=url)
    assert (ran.returncode, ran.stdout) == (0, "nothing expires: store.max_history and store.max_age_ms are 0\n")
    limits = {"HEADRACE_STORE__URL": url, "HEADRACE_STORE__MAX_HISTORY": "30", "HEADRACE_HOT__MAX_LEN": "30"}
    ran = headrace("store", "prune", **limits)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "removed 128 interactions in 2 chunks\n", "")
    assert headrace("store", "prune", **limits).stdout == "removed 0 interactions in 0 chunks\n"
    ran = headrace("store", "verify", **limits)
    assert ran.stdout == "2 users, 4 chunks, 72 interactions, 2 positions, 0 vectors: nothing is wrong\n"
    store = FeatureStore(FeatureStoreConfig(url=url))
    with store.transaction() as transaction:
        transaction.set_position("main", "interactions", 1, 200, watermark_ms=1_700_000_000_000)
        transaction.forget_users(np.array([1]))
    store.close()
    lines = headrace("store", "stats", HEADRACE_STORE__MAX_AGE_MS="3600000", **limits).stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines if line.startswith(("users", "inter", "rem", "wat", "hor"))] == [
        ["users", "1"],
        ["interactions", "36"],
        ["removed", "164 (forget 36, prune 128)"],
        ["watermark", "2023-11-14T22:13:20.000Z"],
        ["horizon", "2023-11-14T21:13:20.000Z"],
    ]


def test_a_database_without_schema_or_of_another_layout_is_one_sentence(
    headrace: Headrace, url: str, tmp_path: Path
) -> None:
    for command in ("stats", "verify", "prune"):
        ran = headrace("store", command, HEADRACE_STORE__URL=f"sqlite:///{tmp_path}/empty.db")
        assert_refused(ran, "headrace migrate")
        ran = headrace("store", command, HEADRACE_STORE__URL=url, HEADRACE_STORE__CHUNK_LEN="32")
        assert_refused(ran, "store.chunk_len")
