"""`headrace trace`, the command: what it prints, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.ids import event_key, stable_id
from feature_store.interactions import Interactions
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from tests.ops.command_line import Headrace, assert_refused

NOW_MS = 1_700_000_000_000
NO_BROKER = {"HEADRACE_LOG__BOOTSTRAP_SERVERS": "127.0.0.1:9", "HEADRACE_LOG__REQUEST_TIMEOUT_MS": "300"}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store in which ann has seen one item, an hour before it arrived."""
    url = f"sqlite:///{tmp_path}/store.db"
    migrate(url)
    store = FeatureStore(FeatureStoreConfig(url=url))
    with store.transaction() as transaction:
        transaction.register_names("user", {stable_id("ann"): "ann"})
        transaction.append(
            Interactions(
                user_id=np.array([stable_id("ann")], np.int64),
                item_id=np.array([3], np.int64),
                event_time_ms=np.array([NOW_MS], np.int64),
                action=np.array([1], np.uint32),
                value=np.array([np.nan], np.float32),
                event_key=np.array([event_key("e1")], np.uint64),
                seq=np.zeros(1, np.uint32),
                arrival_ms=np.array([NOW_MS + 3_600_000], np.int64),
            )
        )
    store.close()
    return url


def test_what_the_store_knows_is_printed_and_what_is_missing_is_said(headrace: Headrace, url: str) -> None:
    ran = headrace("trace", "e1", HEADRACE_STORE__URL=url, **NO_BROKER)
    assert ran.returncode == 1, "it is not known whether anybody was answered with it"
    heading, columns, stored, published = ran.stdout.splitlines()
    assert heading == "event e1: user ann, item 3, at 2023-11-14T22:13:20.000Z"
    assert columns.split() == ["hop", "when", "(UTC)", "since", "append", "since", "event", "what"]
    assert stored.split() == [
        "F1",
        "stored",
        "2023-11-14T23:13:20.000Z",
        "60.0",
        "min",
        "arrival",
        "0",
        "of",
        "its",
        "user",
    ]
    assert published.split()[:3] == ["F3", "published", "unknown"]
    assert ran.stderr.startswith("headrace: the log cannot be read: ")


def test_json_has_the_same(headrace: Headrace, url: str) -> None:
    for user in ("ann", "7"):
        ran = headrace("trace", "e1", "--user", user, "--json", HEADRACE_STORE__URL=url, **NO_BROKER)
        assert ran.returncode == (1 if user == "ann" else 2), ran
        if user == "ann":
            (path,) = json.loads(ran.stdout)["paths"]
            assert (path["user_name"], path["seq"], path["standing"]) == ("ann", 0, "stored")
            assert [hop["state"] for hop in path["hops"]] == ["reached", "unknown"]
        else:
            # Only the log could know of an event of another user, and it is away.
            assert "127.0.0.1:9" in ran.stderr


def test_a_time_that_is_none_is_refused(headrace: Headrace, url: str) -> None:
    assert_refused(headrace("trace", "e1", "--since", "yesterday", HEADRACE_STORE__URL=url), "90s, 30m, 24h or 7d")
