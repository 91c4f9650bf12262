"""Candidates ranked by the head of the weights in service: target-aware, as if each were asked for alone."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.item_table import CONTENT_DIM
from model.llatte_config import LlatteSettings
from model.manifest import Lineage
from model.ranking_learning import ShownBatch, ranking_pass
from model.ranking_model import with_ranking_head
from model.ranking_settings import RankingSettings
from stream.events import EventRules
from stream.messages import Impression, decode_message
from tests.serving.building import MODEL, NOW_MS, Publisher, Town, build_town, eventually, ids_of, scores_of, to_id

ACTIONS = EventRules().actions
RANKING = RankingSettings(
    tasks=("like", "value>=8"),
    score_weights={"like": 2.0, "value>=8": 0.5},
    value_thresholds=(5.0,),
    max_candidates=3,
    task_hidden_dim=8,
    min_labels=100,
)
ITEMS: list[int | str] = [*range(10), "film/ten", "film/eleven"]
FORMS = {
    "merged": RANKING,
    "value": replace(
        RANKING,
        tasks=("like", "value"),
        score_weights={"like": 2.0, "value": 0.5},
        value_center=60.0,
        value_scale=20.0,
    ),
    "interleaved": replace(RANKING, tokens="interleaved"),
    "llatte": replace(RANKING, kind="llatte"),
    "llatte with content": replace(RANKING, kind="llatte"),
}
LLATTE = {"llatte": LlatteSettings(), "llatte with content": LlatteSettings(content=True)}
every_form = pytest.mark.parametrize("form", FORMS)


USERS: tuple[int | str, ...] = (7, 8, "anna")


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal but for the order in which a matrix product sums."""
    for (item, score), (other_item, other_score) in zip(_told(one), _told(other), strict=True):
        assert item == other_item
        assert score == pytest.approx(other_score, abs=1e-5)


def _told(answer: dict[str, Any]) -> list[tuple[Any, Any]]:
    return sorted(
        ((str(item["item_id"]), [item["score"], *item["predictions"].values()]) for item in answer["items"]),
    )


class HeadTown(Town):
    """A town whose publisher has a ranking head that has learned from 100 labels."""

    ranking: RankingSettings

    def ranked(self, **parts: Any) -> dict[str, Any]:
        return {"model_config": self.publisher.recommender.config, "ranking": self.ranking, **parts}

    def publish(self, kind: Any, num_labels: int = 100) -> int:
        lineage = Lineage(log_id="memory", positions=dict(self.publisher.positions), num_labels=num_labels)
        return self.publisher.publish(kind, lineage=lineage).version


async def head_town(tmp_path: Path, database: Path, form: str = "merged") -> HeadTown:
    plain = build_town(tmp_path, database)
    ranking = FORMS[form]
    publisher = Publisher(tmp_path / "snapshots", with_ranking_head(MODEL, ranking, ACTIONS, LLATTE.get(form)))
    town = HeadTown(root=plain.root, store=plain.store, log=plain.log, clock=plain.clock, publisher=publisher)
    town.ranking = ranking
    await town.log.create_topics()
    town.happen(
        [(7, item, NOW_MS - 1_800_000 + 1_000 * n) for n, item in enumerate([1, 2, 4, 5, 3, 0, 6, 7, 8, 2])]
        + [(8, 5, NOW_MS - 600_000), ("anna", "film/ten", NOW_MS - 5_000)],
        announced=False,
    )
    for _ in range(3):
        town.publisher.learn(ITEMS)
    items = publisher.recommender.items
    rows = items.lookup(np.array([to_id(one) for one in ITEMS], np.int64))
    items.describe(rows, np.random.default_rng(0).normal(size=(len(rows), CONTENT_DIM)).astype(np.float32))
    return town


def expected_probabilities(town: HeadTown, history: list[int | str], times_ms: list[int], item: int | str) -> Any:
    """One candidate in a pass of its own, the way the head is trained."""
    recommender = town.publisher.recommender
    ids = [to_id(one) for one in history]
    rows = torch.from_numpy(recommender.items.lookup(np.array([*ids, to_id(item)], np.int64)))
    assert recommender.ranking is not None
    with torch.no_grad():
        labels = recommender.ranking.heads.labels(torch.tensor([0]), torch.tensor([torch.nan]))
    batch = ShownBatch(
        rows_L=rows[:-1],
        actions_L=torch.ones(len(history), dtype=torch.int64),
        values_L=torch.full((len(history),), torch.nan),
        timestamps_ms_L=torch.tensor(times_ms),
        offsets=torch.tensor([0, len(history)]),
        shown_rows_C=rows[-1:],
        shown_at_ms_R=torch.tensor([NOW_MS]),
        shown_offsets=torch.tensor([0, 1]),
    )
    found = ranking_pass(recommender, batch, labels, generator=torch.Generator())
    return recommender.ranking.heads.answers(found.predictions_CK)[0].tolist()


@every_form
async def test_an_answer_is_what_training_computes_of_each_candidate_alone(
    tmp_path: Path, database: Path, form: str
) -> None:
    town = await head_town(tmp_path, database, form)
    town.publish("anchor")
    async with town.worker(version=1, **town.ranked()) as served:
        answer = await served.rank(7, [*ITEMS, "film/unheard-of"])
        ranked_8 = await served.rank(8, [3])
    assert (answer["ranked_by"], answer["fallback"], answer["snapshot_version"]) == ("head", False, 1)
    # The newest eight of ten interactions.
    history, first = [4, 5, 3, 0, 6, 7, 8, 2], 2
    times_ms = [NOW_MS - 1_800_000 + 1_000 * (first + n) for n in range(8)]
    for item in answer["items"][:-1]:
        like, good = expected_probabilities(town, [*history], times_ms, item["item_id"])
        assert item["predictions"] == pytest.approx(dict(zip(town.ranking.tasks, (like, good), strict=True)), abs=1e-5)
        assert item["score"] == pytest.approx(2 * like + 0.5 * good, abs=1e-5)
        assert item["known"]
    assert answer["items"][-1] == {"item_id": "film/unheard-of", "score": None, "known": False, "predictions": None}
    scores = [item["score"] for item in answer["items"][:-1]]
    assert scores == sorted(scores, reverse=True)
    (like, good) = expected_probabilities(town, [5], [NOW_MS - 600_000], 3)
    assert ranked_8["items"][0]["predictions"] == pytest.approx(
        dict(zip(town.ranking.tasks, (like, good), strict=True)), abs=1e-5
    )


async def test_until_the_head_has_learned_enough_the_retrieval_score_ranks(tmp_path: Path, database: Path) -> None:
    town = await head_town(tmp_path, database, "merged")
    town.publish("anchor", num_labels=99)
    async with town.worker(version=1, **town.ranked()) as served:
        before = await served.rank(7, ITEMS[:10])
        recommended = await served.recommend(7, k=12, exclude_seen=False)
        assert before["ranked_by"] == "retrieval"
        assert ids_of(before) == [item for item in ids_of(recommended) if item in ITEMS[:10]]
        assert all(item["predictions"] is None for item in before["items"])
        town.publisher.learn([1])
        await served.until_version(town.publish("delta", num_labels=100))
        after = await served.rank(7, ITEMS)
        assert after["ranked_by"] == "head"
        assert all(0 < item["predictions"]["like"] < 1 for item in after["items"])
        assert ids_of(await served.recommend(7, k=12, exclude_seen=False)) != ids_of(after)


async def test_without_a_history_candidates_are_ranked_by_popularity(tmp_path: Path, database: Path) -> None:
    town = await head_town(tmp_path, database, "merged")
    town.publish("anchor")
    async with town.worker(version=1, **town.ranked()) as served:
        answer = await served.rank("nobody", [0, 2, 5])
    assert (answer["ranked_by"], answer["fallback_reason"]) == ("popularity", "no_history")


@every_form
async def test_after_every_swap_the_head_answers_like_a_fresh_worker(tmp_path: Path, database: Path, form: str) -> None:
    town = await head_town(tmp_path, database, form)
    town.publish("anchor")
    async with town.worker(version=1, **town.ranked()) as served:
        told = [scores_of(await served.rank(user, ITEMS)) for user in USERS]
        for version in range(2, 8):
            town.publisher.learn([version, (3 * version) % 10, 100 + version])
            town.publish("anchor" if version == 5 else "delta")
            await served.until_version(version)
            found = [await served.rank(user, [*ITEMS, 102]) for user in USERS]
            async with town.worker(version=version, **town.ranked(replica="fresh")) as fresh:
                for user, one in zip(USERS, found, strict=True):
                    assert_same(one, await fresh.rank(user, [*ITEMS, 102]))
                    assert (one["snapshot_version"], one["ranked_by"]) == (version, "head")
        assert told != [scores_of(one) for one in found]


async def test_requests_of_one_micro_batch_are_answered_as_alone(tmp_path: Path, database: Path) -> None:
    town = await head_town(tmp_path, database, "merged")
    town.publish("anchor")
    async with town.worker(version=1, **town.ranked()) as served:
        asked: list[tuple[int | str, list[int | str]]] = [(7, ITEMS), (8, [3]), ("anna", ITEMS[:5]), (7, ITEMS[4:])]
        alone = [scores_of(await served.rank(user, candidates)) for user, candidates in asked]
        together = await asyncio.gather(
            *(served.rank(user, candidates) for user, candidates in asked), served.recommend(8, k=3)
        )
    for one, answer in zip(alone, together[:-1], strict=True):
        assert scores_of(answer) == pytest.approx(one, abs=1e-5)


async def test_impressions_carry_the_combined_score_and_what_it_was_made_of(tmp_path: Path, database: Path) -> None:
    town = await head_town(tmp_path, database, "merged")
    town.publish("anchor")
    async with town.worker(version=1, **town.ranked()) as served:
        answer = await served.rank(7, [1, 2, 99])
        await served.recommend(7, k=2)
        await served.rank("nobody", [1, 2])
    records = town.log.records((town.log.topics.impressions, 0))
    impression, recommended, by_popularity = (decode_message(Impression, record.value) for record in records)
    known = answer["items"][:2]
    assert impression.predictions == {
        task: [*(item["predictions"][task] for item in known), None] for task in RANKING.tasks
    }
    assert recommended.predictions is None
    assert by_popularity.predictions is None
    assert impression.items == ids_of(answer)
    assert impression.scores == [item["score"] for item in answer["items"]]
    assert impression.scores[-1] is None
    assert not math.isnan(impression.scores[0] or math.nan)


async def test_weights_with_a_head_are_refused_by_a_worker_without_one(tmp_path: Path, database: Path) -> None:
    town = await head_town(tmp_path, database, "merged")
    town.publish("anchor")
    async with town.worker() as served:
        await eventually(lambda: served.worker.status()["snapshot"]["last_refusal"])  # type: ignore[index]
        refusal: Any = served.worker.status()["snapshot"]
        assert "[model], [ranking]" in refusal["last_refusal"]
