"""Content says where a newcomer starts, and gives a row to items without interactions; bounded, and resumed exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.hot import HotHistories
from feature_store.store import FeatureStore
from model.config import ModelConfig
from model.item_table import CONTENT_DIM, ItemTable
from model.llatte_config import LlatteSettings
from model.ranking_model import with_ranking_head
from model.ranking_settings import RankingSettings
from model.recommender import Recommender
from model.snapshot import chain, list_versions, load_snapshot
from model.swap import apply_snapshot
from online_trainer.checkpoint import read_newest_checkpoint, write_checkpoint
from online_trainer.config import ItemsConfig
from online_trainer.item_content import ItemContent, ItemNews, content_vector
from online_trainer.learner import OnlineLearner
from stream.clock import WallClock
from stream.messages import HistoryUpdate, ItemMessage, encode_message
from tests.online_trainer.conftest import HOT, MODEL, RecordedStream, record_stream, walks
from tests.online_trainer.test_daemon import Site, learn, running, site, until
from tests.online_trainer.test_learner import assert_equal, run

__all__ = ["site"]


COLD = ItemsConfig(cold_items=1_000)


def vector(*categories: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    found = content_vector(None, categories)
    assert found is not None
    return found


def news_of(item_id: int, *categories: str, offset: int = 0, is_available: bool = True) -> ItemNews:
    return ItemNews(
        item_id=item_id,
        content=vector(*categories),
        is_available=is_available,
        partition=0,
        offset=offset,
        append_ms=0,
    )


# The content of an item


def test_similar_embeddings_of_any_length_have_similar_content() -> None:
    rng = np.random.default_rng(0)
    cosines, found = [], []
    for length in (16, 384, 1_536):
        for _ in range(20):
            one = rng.normal(size=length).astype(np.float32)
            other = (one + rng.normal(size=length) * rng.uniform(0, 3)).astype(np.float32)
            cosines.append(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))
            left, right = content_vector(one, ()), content_vector(other, ())
            assert left is not None
            assert right is not None
            found.append(float(left @ right))
    assert np.abs(np.array(cosines) - np.array(found)).mean() < 0.15
    assert np.corrcoef(cosines, found)[0, 1] > 0.85


def test_shared_categories_make_content_similar_and_their_order_does_not_matter() -> None:
    assert vector("a", "b") @ vector("b", "a") == pytest.approx(1)
    assert vector("a", "b") @ vector("a", "c") > 0.2
    assert abs(vector("a") @ vector("b")) < 0.5


def test_embedding_and_categories_weigh_the_same() -> None:
    embedding = np.arange(8, dtype=np.float32)
    both = content_vector(embedding, ("a",))
    alone = content_vector(embedding, ())
    assert both is not None
    assert alone is not None
    assert both @ alone == pytest.approx(both @ vector("a"), abs=1e-6)


@pytest.mark.parametrize("embedding", [None, np.zeros(4, np.float32), np.array([np.nan, 1], np.float32)])
def test_what_says_nothing_is_no_content(embedding: Any) -> None:
    assert content_vector(embedding, ()) is None


# What is kept


def test_only_the_newest_are_kept_and_an_item_told_of_again_takes_no_other_place() -> None:
    content = ItemContent(3, 4)
    for item_id in (1, 2, 3):
        content.put(item_id, vector(str(item_id)))
    content.put(2, vector("changed"))
    content.put(4, vector("4"))
    is_known, vectors = content.of(np.array([1, 2, 3, 4]))
    assert is_known.tolist() == [False, True, True, True]
    np.testing.assert_array_equal(vectors, [vector("changed"), vector("3"), vector("4")])
    assert len(content) == 3


@pytest.mark.parametrize(("limit", "kept"), [(3, [3, 4, 5]), (2, [4, 5]), (10, [3, 4, 5])])
def test_after_a_restart_it_goes_on_also_under_another_limit(limit: int, kept: list[int]) -> None:
    content, restarted = ItemContent(3, 4), ItemContent(limit, 4)
    for item_id in range(1, 6):
        content.put(item_id, vector(str(item_id)))
    restarted.load_state(content.state())
    ids = np.arange(1, 6)
    assert ids[restarted.of(ids)[0]].tolist() == kept
    np.testing.assert_array_equal(restarted.of(ids)[1], [vector(str(item_id)) for item_id in kept])
    restarted.put(9, vector("9"))
    assert ids[restarted.of(ids)[0]].tolist() == (kept if limit == 10 else kept[1:])


def table_of_two_kinds() -> tuple[ItemTable, ItemContent]:
    """Even items are of kind `a` and lie at +1, odd ones of kind `b` at -1."""
    config = ModelConfig(embedding_dim=4, max_items=1_000, item_init_std=1e-9)
    items, content = ItemTable(config), ItemContent(1_000, 4)
    items.admit(np.arange(40))
    items.weight[:40] = torch.tensor([1.0, -1.0]).repeat(20)[:, None].expand(40, 4)
    items.observe(np.arange(40), np.full(40, 1_000))
    for item_id in range(40):
        content.put(item_id, vector("a" if item_id % 2 == 0 else "b"))
    return items, content


def test_a_newcomer_starts_where_items_of_similar_content_are() -> None:
    items, content = table_of_two_kinds()
    content.put(100, vector("a"))
    content.put(101, vector("b"))
    rows = items.admit(np.array([100, 101, 102]), centre_of=lambda ids, at: content.centres(items, ids, at))
    weight = items.weight[torch.from_numpy(rows)]
    torch.testing.assert_close(weight[0], torch.ones(4), atol=0.1, rtol=0)
    torch.testing.assert_close(weight[1], -torch.ones(4), atol=0.1, rtol=0)
    torch.testing.assert_close(weight[2], torch.zeros(4), atol=0.1, rtol=0)  # without content: the mean of newcomers


def test_the_projection_equals_ridge_regression() -> None:
    items, content = table_of_two_kinds()
    items.weight[:40] += torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    x = content.of(np.arange(40))[1].astype(np.float64)
    y = items.weight[:40].double().numpy()
    centred = y - y.mean(0)
    want = y.mean(0) + x @ np.linalg.solve(x.T @ x + np.eye(CONTENT_DIM), x.T @ centred)
    got = content.centres(items, np.arange(40), torch.zeros(4))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-4)


def test_without_a_trained_item_of_known_content_newcomers_start_as_ever() -> None:
    content = ItemContent(10, 4)
    content.put(1, vector("a"))
    items = ItemTable(ModelConfig(embedding_dim=4, max_items=10))
    assert content.centres(items, np.array([1]), torch.full((4,), 0.5)).tolist() == [[0.5] * 4]


# In the learner


def news(count: int = 60) -> list[ItemNews]:
    return [news_of(item, "even" if item % 2 == 0 else "odd", str(item % 5), offset=item) for item in range(count)]


def told(stream: RecordedStream, **settings: Any) -> OnlineLearner:
    """Told of 30 items at the start and of 30 more, 20 of which nobody interacts with, after five steps."""
    learner = stream.learner(**({"items": COLD} | settings))
    learner.tell(news()[:30])
    run(stream, learner, steps=5)
    learner.tell(news()[30:])
    return learner


def test_items_with_content_get_a_row_before_their_first_interaction_and_can_be_scored(store: FeatureStore) -> None:
    stream = record_stream(store, walks(300))
    learner = run(stream, told(stream))
    assert 50 <= learner.ledger.num_cold <= 60  # some of the second half had been interacted with by then
    rows = learner.model.items.lookup(np.arange(60))
    assert (rows >= 0).all()
    scores = learner.model.scores(torch.zeros(1, MODEL.embedding_dim))
    assert torch.isfinite(scores[0, torch.from_numpy(rows[40:])]).all()
    assert learner.weights_are_finite()
    # They are candidates like any other: the test before each step ranks them.
    assert learner.metrics_summary()["model.lifetime.count"] == 300 - 30


def test_an_item_that_is_not_available_or_was_told_of_without_content_gets_no_row(store: FeatureStore) -> None:
    learner = record_stream(store, walks(50)).learner(items=COLD)
    withdrawn = news_of(7, "a", is_available=False)
    bare = ItemNews(item_id=8, content=None, is_available=True, partition=0, offset=1, append_ms=0)
    learner.tell([withdrawn, bare])
    assert learner.num_items == 0
    assert learner.items_read == {0: 2}


def test_no_more_cold_items_have_a_row_than_the_setting_allows(store: FeatureStore) -> None:
    stream = record_stream(store, walks(300))
    learner = run(stream, told(stream, items=ItemsConfig(cold_items=10)))
    items = learner.model.items
    assert int((items.trend[: items.num_items] == -torch.inf).sum()) <= 10
    assert learner.num_items <= 40 + 10


def test_cold_items_take_no_place_from_items_that_are_interacted_with(store: FeatureStore) -> None:
    stream = record_stream(store, walks(300))
    learner = stream.learner(max_items=64, batch_interactions=16, items=COLD)
    learner.tell([news_of(item, "a") for item in range(1_000, 1_200)])
    assert learner.num_items == 32
    assert run(stream, learner).ledger.num_interactions == 300


@pytest.mark.parametrize("steps", [2, 9])
def test_a_run_with_content_continues_from_a_checkpoint_bit_by_bit(
    store: FeatureStore, tmp_path: Path, steps: int
) -> None:
    stream = record_stream(store, walks(300))
    unbroken = run(stream, told(stream))
    if steps == 2:  # before the second half is told
        first = stream.learner(items=COLD)
        first.tell(news()[:30])
        run(stream, first, steps=2)
    else:
        first = run(stream, told(stream), steps=4)
    write_checkpoint(tmp_path, first.capture_checkpoint(), keep=1)
    checkpoint = read_newest_checkpoint(tmp_path, config_hash=MODEL.config_hash())
    assert checkpoint is not None
    continued = stream.learner(items=COLD)
    continued.load_checkpoint(checkpoint)
    assert continued.items_read == {0: 30 if steps == 2 else 60}
    if steps == 2:
        run(stream, continued, steps=3)
        continued.tell(news()[30:])
    assert_equal(unbroken.capture_checkpoint(), run(stream, continued).capture_checkpoint())


def test_content_that_is_read_again_is_heard_from_its_start(store: FeatureStore) -> None:
    stream = record_stream(store, walks(50))
    without = replace(COLD, content_items=0)
    was_on, off, on_again = (stream.learner(items=items) for items in (COLD, without, COLD))
    was_on.tell(news())
    off.load_checkpoint(was_on.capture_checkpoint())
    assert len(off._catalogue._told._content) == 0, "as if it had been off for long"
    on_again.load_checkpoint(off.capture_checkpoint())
    assert on_again.items_read == {}


# In the daemon


def just_now(updates: list[HistoryUpdate]) -> list[HistoryUpdate]:
    """As if appended after all that was said so far."""
    return [replace(one, append_ms=np.full(len(one.offsets), WallClock().now_ms() + 1)) for one in updates]


def say(site: Site, item_id: int, *categories: str) -> None:
    message = ItemMessage(item_id=item_id, categories=list(categories))
    site.log.append(site.log.topics.items, 0, str(item_id).encode(), encode_message(message), ())


async def test_the_daemon_learns_of_items_from_their_topic_and_publishes_cold_ones(site: Site) -> None:
    updates = record_stream(site.store, walks(300)).updates
    for item_id in range(50):
        say(site, item_id, str(item_id % 5))
    site.send(just_now(updates))
    status = await learn(site.daemon(items=COLD), 300)
    assert status["cold_items"] == 50
    versions = list_versions(site.root / "snapshots", "default")
    served = Recommender(MODEL)
    for version in chain(site.root / "snapshots", "default", have=None, want=versions[-1]):
        apply_snapshot(served, load_snapshot(site.root / "snapshots", "default", version))
    assert (served.items.lookup(np.arange(40, 50)) >= 0).all()


async def test_a_daemon_that_comes_back_reads_on_where_it_was_in_the_items(site: Site) -> None:
    updates = record_stream(site.store, walks(200)).updates
    say(site, 1_000, "a")
    site.log.append(site.log.topics.items, 0, None, b"not an item", ())
    site.send(just_now(updates[:2]))
    assert (await learn(site.daemon(items=COLD), 100))["cold_items"] == 1
    say(site, 1_001, "a")
    site.send(just_now(updates[2:]))
    daemon = site.daemon(items=COLD)
    async with running(daemon):
        await until(lambda: daemon.status()["interactions"] == 200)
    assert daemon.status()["cold_items"] == 2
    assert daemon._learner.items_read == {0: 3}


async def test_what_is_said_later_than_a_step_happened_is_not_known_in_it(site: Site) -> None:
    updates = record_stream(site.store, walks(100)).updates  # appended long ago
    say(site, 1_000, "a")
    site.send(updates)
    assert (await learn(site.daemon(items=COLD), 100))["cold_items"] == 0


async def test_a_topic_of_items_that_was_made_anew_is_read_from_its_start(site: Site) -> None:
    updates = record_stream(site.store, walks(200)).updates
    for item_id in range(1_000, 1_005):
        say(site, item_id, "a")
    site.send(just_now(updates[:2]))
    await learn(site.daemon(items=COLD), 100)
    site.log.records((site.log.topics.items, 0)).clear()
    say(site, 2_000, "b")
    site.send(just_now(updates[2:]))
    assert (await learn(site.daemon(items=COLD), 200))["cold_items"] == 6


# Content as a part of what the ranker reads


def reading_learner(stream: RecordedStream, **items: Any) -> OnlineLearner:
    ranking = RankingSettings(kind="llatte", tasks=("click",), learn_from="interactions")
    model = with_ranking_head(MODEL, ranking, ("click", "like"), LlatteSettings(content=True))
    config = replace(
        stream.config(), model=model, ranking=ranking, actions=("click", "like"), items=ItemsConfig(**items)
    )
    return OnlineLearner(config, HotHistories(stream.store, HOT), log_id="main")


def test_a_ranker_reads_content_that_came_before_and_after_the_first_interaction(store: FeatureStore) -> None:
    stream = record_stream(store, walks(60))
    learner = reading_learner(stream, cold_items=2)
    batcher, items = stream.batcher(learner), learner.model.items
    first = batcher.take()
    assert first is not None
    early, late = np.unique(first.interactions.item_id)[:2].tolist()
    learner.tell([news_of(early, "early"), news_of(1_000_000, "cold", offset=1)])
    learner.step(first)
    while batch := batcher.take():
        learner.step(batch)
    learner.tell([news_of(late, "late", offset=2), news_of(early, "changed", offset=3)])
    rows = items.lookup(np.array([early, late, 1_000_000]))
    assert rows.min() >= 0
    found = items.content_of(torch.from_numpy(rows))
    assert found is not None
    for one, category in zip(found.numpy(), ("changed", "late", "cold"), strict=True):
        np.testing.assert_allclose(one, vector(category), atol=3e-4)
    assert learner.ranking is not None
    assert learner.ranking.account.num_learned > 0


def test_a_ranker_that_reads_content_needs_content_to_be_kept(store: FeatureStore) -> None:
    with pytest.raises(ValueError, match="llatte.content is on and items.content_items is 0"):
        reading_learner(record_stream(store, walks(10)), content_items=0)
