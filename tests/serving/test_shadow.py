"""A candidate beside the weights in service, and what is said about its answers."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model.config import ModelConfig
from serving.divergence import Divergence, Mean
from serving.queries import Ranking
from serving.weights import WeightsInfo
from tests.serving.building import MODEL, SERVING, Served, Town, eventually, flip_last_byte, ids_of, scores_of
from tests.serving.test_guards import spoil


def ranking(items: list[int], scores: list[float], reason: str | None = None) -> Ranking:
    return Ranking(
        weights=WeightsInfo(version=1, kind="anchor", watermark_ms=0, created_at_ms=0),
        history_time_ms=None,
        fallback_reason=reason,
        item_ids=np.array(items, np.int64),
        scores=np.array(scores, np.float32),
        places=np.empty(0, np.int64),
    )


def test_equal_answers_do_not_diverge() -> None:
    divergence = Divergence()
    one = ranking([3, 1, 2], [0.9, 0.5, 0.1])
    divergence.add(one, one)
    report = divergence.report()
    assert (report.overlap_at_10, report.same_first, report.rank_correlation) == (1, 1, 1)
    assert (report.score_shift, report.score_distance, report.num_compared) == (0, 0, 1)


def test_what_differs_is_measured_on_what_both_hold() -> None:
    divergence = Divergence()
    divergence.add(ranking([1, 2, 3, 4], [4, 3, 2, 1]), ranking([3, 2, 1, 9], [5, 4, 3, 2]))
    report = divergence.report()
    assert report.overlap_at_10 == 0.75
    assert report.same_first == 0
    assert report.rank_correlation == -1
    assert report.score_shift == pytest.approx((3 - 4 + 4 - 3 + 5 - 2) / 3)
    assert report.score_distance == 0.25


def test_the_correlation_is_spearman_s() -> None:
    divergence = Divergence()
    random = np.random.default_rng(0)
    for _ in range(20):
        items = random.permutation(50)[:8]
        other = random.permutation(items)
        divergence.add(ranking(items.tolist(), [0.0] * 8), ranking(other.tolist(), [0.0] * 8))
        places = np.array([other.tolist().index(item) for item in items])
        expected = np.corrcoef(np.arange(8), places)[0, 1]
        alone = Divergence()
        alone.add(ranking(items.tolist(), [0.0] * 8), ranking(other.tolist(), [0.0] * 8))
        assert alone.report().rank_correlation == pytest.approx(expected)
    assert divergence.report().num_compared == 20


def test_answers_by_popularity_and_unknown_candidates_are_not_compared() -> None:
    divergence = Divergence()
    divergence.add(ranking([1], [1.0], "no_history"), ranking([2], [1.0]))
    divergence.add(ranking([1], [1.0], "no_history"), ranking([2], [1.0], "no_history"))
    divergence.add(ranking([1, 2], [1.0, float("nan")]), ranking([1, 2], [2.0, 1.0]))
    divergence.add(ranking([], []), ranking([], []))
    report = divergence.report()
    assert (report.num_compared, report.num_fallback_differs) == (4, 1)
    assert report.score_shift == 1.0
    assert report.rank_correlation is None


def test_a_report_read_meanwhile_counts_nothing_that_its_means_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    divergence, seen = Divergence(), []
    add = Mean.add

    def looked_at(mean: Mean, value: float) -> None:
        seen.append(divergence.report())
        add(mean, value)

    monkeypatch.setattr(Mean, "add", looked_at)
    divergence.add(ranking([1, 2], [2.0, 1.0]), ranking([1, 2], [2.0, 1.0]))
    assert {report.num_compared for report in seen} == {0}


# --- a worker --------------------------------------------------------------------------------------------------------


async def shadow(served: Served, version: int, share: float = 1.0, status: int = 200) -> dict[str, Any]:
    response = await served.client.post(f"/admin/snapshots/{version}/shadow", params={"share": share})
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def report_of(served: Served) -> dict[str, Any]:
    report: dict[str, Any] = (await served.client.get("/admin/shadow")).json()["shadow"]
    return report


async def until_compared(served: Served, num: int) -> dict[str, Any]:
    await eventually(lambda: (served.worker.shadowing.report() or {}).get("num_compared", 0) >= num)
    return await report_of(served)


async def ask(served: Served) -> None:
    for user_id in (7, 8, "anna", "bert"):
        await served.recommend(user_id, k=10)
        await served.rank(user_id, [1, 2, 3, 4_000, "film/ten"])


@pytest.fixture
def two(town: Town) -> Town:
    """Version 2 is another candidate than 1, and current."""
    town.publisher.learn([1, 2, 3, 5, 8])
    town.publisher.publish()
    return town


async def test_the_version_in_service_beside_itself_does_not_diverge(two: Town) -> None:
    async with two.worker(version=2) as served:
        await shadow(served, 2)
        await ask(served)
        report = await until_compared(served, 8)
        assert (report["version"], report["against"], report["num_compared"]) == (2, 2, 8)
        assert (report["overlap_at_10"], report["rank_correlation"], report["same_first"]) == (1, 1, 1)
        assert report["score_shift"] == pytest.approx(0, abs=1e-5)
        assert 5_000 < report["memory_bytes"] < 100_000, "not what is reserved for a million items"


async def test_a_candidate_answers_as_if_it_were_served_and_nobody_sees_it(two: Town) -> None:
    async with two.worker(version=2, config=replace(SERVING, log_impressions=True)) as served:
        before = [scores_of(await served.recommend(user_id, k=12)) for user_id in (7, "anna")]
        await shadow(served, 1)
        after = [scores_of(await served.recommend(user_id, k=12)) for user_id in (7, "anna")]
        report = await until_compared(served, 2)
        assert served.worker.snapshot_version == 2
        assert [pytest.approx(one, rel=1e-5) for one in before] == after
        await served.client.post("/admin/snapshots/1/pin")
        await served.until_version(1)
        at_1 = [scores_of(await served.recommend(user_id, k=12)) for user_id in (7, "anna")]
    shifts = [
        np.mean([(at_1[n][item] or 0) - (before[n][item] or 0) for item in before[n] if item in at_1[n]])
        for n in range(2)
    ]
    assert report["score_shift"] == pytest.approx(np.mean(shifts), rel=1e-3, abs=1e-5)
    assert abs(report["score_shift"]) > 1e-4


async def test_a_terrible_candidate_shows_before_it_is_promoted(two: Town) -> None:
    async with two.worker(version=2) as served:
        await served.client.post("/admin/snapshots/2/pin")
        spoil(two.publisher)
        two.publisher.publish()
        await shadow(served, 3)
        await ask(served)
        report = await until_compared(served, 8)
        assert report["score_shift"] == pytest.approx(50, abs=1)
        assert report["score_distance"] == 1
        assert served.worker.status()["shadow"]["version"] == 3  # type: ignore[index]


async def test_a_candidate_that_cannot_answer_ends_nothing(two: Town) -> None:
    async with two.worker(version=2) as served:
        await shadow(served, 1)
        candidate = served.worker.shadowing._shadow
        assert candidate is not None
        candidate.ranker._weights.recommender = None  # type: ignore[assignment] # any bug
        await ask(served)
        await eventually(lambda: served.worker.shadowing.num_failed == 8)
        await ask(served)
        assert served.worker.failure is None
        assert served.worker.shadowing.report()["num_compared"] == 0  # type: ignore[index]


async def test_only_a_share_is_answered_again_and_its_memory_goes_when_it_stops(two: Town) -> None:
    async with two.worker(version=2) as served:
        assert await report_of(served) is None
        await shadow(served, 1, share=0.2)
        weights = weakref.ref(served.worker.shadowing._shadow.ranker._weights)  # type: ignore[union-attr]
        for n in range(200):
            await served.client.post("/v1/recommend", json={"user_id": n % 10})
        report = await until_compared(served, 10)
        assert 15 <= report["num_compared"] + report["num_skipped"] <= 75
        response = await served.client.delete("/admin/shadow")
        assert response.json()["version"] == 1
        assert (await served.client.delete("/admin/shadow")).json()["version"] is None
        assert await report_of(served) is None
        await served.recommend(7)
        gc.collect()
        assert weights() is None


@pytest.mark.parametrize(("version", "share", "status"), [(9, 1, 409), (1, 1, 409), (2, 0, 422), (2, 1.5, 422)])
async def test_what_cannot_be_compared_is_refused(two: Town, version: int, share: float, status: int) -> None:
    flip_last_byte(two.publisher.folder(1) / "rows.safetensors")
    two.publisher.publish("anchor")
    async with two.worker(version=3) as served:
        assert (await shadow(served, version, share, status))["error"]["message"]
        assert await report_of(served) is None
        assert ids_of(await served.recommend(7))


async def test_a_candidate_of_another_shape_is_refused_by_its_setting(two: Town) -> None:
    other = ModelConfig(**{**MODEL.as_dict(), "embedding_dim": 8})
    async with two.worker(version=2) as served:
        served.worker.shadowing._parts.reader._config = other
        error = (await shadow(served, 2, status=409))["error"]
        assert "other settings ([model], [ranking])" in error["message"]
