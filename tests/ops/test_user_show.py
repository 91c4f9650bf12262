"""`headrace user show`: the history of a user, with names, in both databases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.ids import stable_id
from feature_store.interactions import Interactions
from feature_store.records import Item
from feature_store.store import FeatureStore
from ops.user_history import action_names, surface_name
from tests.feature_store.databases import migrated_database
from tests.ops.command_line import Headrace, assert_refused

NOW_MS = 1_700_000_000_000


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store of user 5, the user named ann, and the user whose name is the text 17."""
    with migrated_database(request.param, tmp_path) as url:
        store = FeatureStore(FeatureStoreConfig(url=url))
        with store.transaction() as transaction:
            transaction.register_names("user", {stable_id("ann"): "ann", stable_id("17"): "17"})
            transaction.register_names("item", {stable_id("film\n"): "film\n"})
            transaction.upsert_items([Item(item_id=1, title="Heat")])
            transaction.append(interactions(5, items=[1, stable_id("film\n"), 3]))
            transaction.append(interactions(stable_id("ann"), items=[1]))
            transaction.append(interactions(stable_id("17"), items=[2]))
        store.close()
        yield url


def test_a_user_whose_interactions_have_all_expired_is_known(headrace: Headrace, url: str) -> None:
    store = FeatureStore(FeatureStoreConfig(url=url))
    with store.transaction() as transaction:
        transaction.lock_position("main", "interactions", 0)
        transaction.set_position("main", "interactions", 0, 5, watermark_ms=NOW_MS + 90_000)
    store.close()
    ran = headrace("user", "show", "5", HEADRACE_STORE__URL=url, HEADRACE_STORE__MAX_AGE_MS="89000")
    assert (ran.returncode, ran.stdout.splitlines()[0]) == (0, "user 5: 3 interactions, the newest 2 of them")
    ran = headrace("user", "show", "5", HEADRACE_STORE__URL=url, HEADRACE_STORE__MAX_AGE_MS="60000")
    assert (ran.returncode, ran.stdout) == (0, "user 5: 3 interactions, all of them expired\n")


def interactions(user_id: int, *, items: list[int]) -> Interactions:
    """A view of each item, a second apart, the newest arriving first; the first is a rating and a like as well."""
    count = len(items)
    return Interactions(
        user_id=np.full(count, user_id, np.int64),
        item_id=np.array(items, np.int64)[::-1],
        event_time_ms=(NOW_MS + 1_000 * np.arange(count, dtype=np.int64))[::-1],
        action=np.array([0b1011, *[0b10] * (count - 1)], np.uint32)[::-1],
        value=np.array([4.5, *[np.nan] * (count - 1)], np.float32)[::-1],
        event_key=np.arange(count, dtype=np.uint64),
        seq=np.zeros(count, np.uint32),
        arrival_ms=np.full(count, NOW_MS + 60_000, np.int64),
    )


def test_a_history_is_printed_in_event_order_with_names(headrace: Headrace, url: str) -> None:
    ran = headrace("user", "show", "5", HEADRACE_STORE__URL=url)
    assert (ran.returncode, ran.stderr) == (0, "")
    heading, columns, *rows = ran.stdout.splitlines()
    assert heading == "user 5: 3 interactions"
    assert columns.split() == ["event", "time", "item", "action", "value", "seq", "arrived"]
    assert [row.split() for row in rows] == [
        ["2023-11-14T22:13:20.000Z", "1", "Heat", "rating+view+like", "4.5", "2", "2023-11-14T22:14:20.000Z"],
        ["2023-11-14T22:13:21.000Z", r"film\n", "view", "-", "1", "2023-11-14T22:14:20.000Z"],
        ["2023-11-14T22:13:22.000Z", "3", "view", "-", "0", "2023-11-14T22:14:20.000Z"],
    ]


def test_only_what_can_be_a_user_is_forgotten(headrace: Headrace) -> None:
    assert_refused(headrace("user", "forget", "9" * 19), "the largest number is")
    assert_refused(headrace("user", "forget", "x" * 257), "1 to 256 characters")


def test_a_limit_shows_the_newest_and_says_so(headrace: Headrace, url: str) -> None:
    ran = headrace("user", "show", "5", "--limit", "1", HEADRACE_STORE__URL=url)
    heading, _, row = ran.stdout.splitlines()
    assert heading == "user 5: 3 interactions, the newest 1 of them"
    assert row.split()[1] == "3"


def test_json_has_everything(headrace: Headrace, url: str) -> None:
    shown = json.loads(headrace("user", "show", "5", "--json", HEADRACE_STORE__URL=url).stdout)
    assert (shown["user_id"], shown["name"], shown["num_interactions"]) == (5, None, 3)
    assert shown["interactions"][0] == {
        "event_time_ms": NOW_MS,
        "item_id": 1,
        "item_name": None,
        "title": "Heat",
        "actions": ["rating", "view", "like"],
        "surface": None,
        "value": 4.5,
        "seq": 2,
        "arrival_ms": NOW_MS + 60_000,
    }
    assert (shown["interactions"][1]["item_name"], shown["interactions"][1]["value"]) == ("film\n", None)


def test_a_text_id_is_found_also_when_it_looks_like_a_number(headrace: Headrace, url: str) -> None:
    for text in ("ann", "17"):
        heading = headrace("user", "show", text, HEADRACE_STORE__URL=url).stdout.splitlines()[0]
        assert heading == f"user {stable_id(text)} ({text}): 1 interaction"


def test_a_user_without_history_is_one_sentence_and_status_1(headrace: Headrace, url: str) -> None:
    for unknown in ("6", "bob", "9" * 40, "\x1b"):
        ran = headrace("user", "show", unknown, HEADRACE_STORE__URL=url)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr == f"headrace: user {unknown!r} has no history\n"


def test_an_id_that_is_not_utf8_is_one_sentence(headrace: Headrace, url: str) -> None:
    for command in (("user", "show"), ("trace",)):
        assert_refused(headrace(*command, "b\udcff", HEADRACE_STORE__URL=url), "is not UTF-8 text")


def test_a_database_without_schema_is_one_sentence(headrace: Headrace, tmp_path: Path) -> None:
    ran = headrace("user", "show", "5", HEADRACE_STORE__URL=f"sqlite:///{tmp_path}/empty.db")
    assert_refused(ran, "headrace migrate")


def test_a_surface_is_shown_with_the_action(headrace: Headrace, url: str) -> None:
    on_page = replace(interactions(9, items=[1, 3]), surface=np.array([0, 2], np.uint8))
    store = FeatureStore(FeatureStoreConfig(url=url))
    with store.transaction() as transaction:
        transaction.append(on_page)
    store.close()
    declared = {"HEADRACE_EVENTS__SURFACE_KEY": "page", "HEADRACE_EVENTS__SURFACES": '["home", "search"]'}
    ran = headrace("user", "show", "9", HEADRACE_STORE__URL=url, **declared)
    assert [row.split()[-4] for row in ran.stdout.splitlines()[2:]] == ["rating+view+like@search", "view"]
    assert (surface_name(0, ("home",)), surface_name(1, ("home",)), surface_name(3, ("home",))) == (
        None,
        "home",
        "surface 3",
    )


def test_an_action_that_is_not_declared_any_more_is_named_by_its_bit() -> None:
    assert action_names(0b1000_0000_0000_0000_0000_0000_0000_0101, ("rating", "view")) == ("rating", "bit 2", "bit 31")
    assert action_names(0, ("rating",)) == ()
