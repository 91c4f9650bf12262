"""Going back to the version before when live guards trip, and not when they should not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.rejection import Rejection, read_rejections
from model.retention import read_leases
from serving.guard_config import GuardConfig
from serving.guards import FAILURES, LATENCY, SCORES, Judgement, SwapGuards, judge, ks_distance
from serving.queries import NOT_FINITE, Query, Ranking, RankQuery, RecommendQuery
from serving.weights import PreparedSwap, WeightsInfo
from tests.serving.building import NAME, SERVING, Publisher, Served, Town, eventually, ids_of, scores_of

CONFIG = GuardConfig(answers_min=50, latency_ms_min=10)
QUICK = GuardConfig(answers_min=20, check_ms=10, cooldown_ms=300)
NO_IDS = np.empty(0, np.int64)


def query(kind: str = "recommend") -> Query:
    if kind == "rank":
        return RankQuery(user_id=1, candidates=NO_IDS)
    return RecommendQuery(user_id=1, k=10, exclude_seen=True, exclude=NO_IDS)


def ranking(version: int, scores: Sequence[float], reason: str | None = None) -> Ranking:
    return Ranking(
        weights=WeightsInfo(version=version, kind="delta", watermark_ms=0, created_at_ms=0),
        history_time_ms=None,
        fallback_reason=reason,
        item_ids=NO_IDS,
        scores=np.array(scores, np.float32),
        places=NO_IDS,
    )


class World:
    """Guards that judge as soon as they can; answers are drawn at random."""

    def __init__(self, config: GuardConfig = CONFIG, seed: int = 0) -> None:
        self.config, self.guards, self.random = config, SwapGuards(config), np.random.default_rng(seed)
        self.judgements: list[Judgement] = []

    def answer(
        self,
        version: int,
        num: int = 60,
        *,
        mean: float = 0.0,
        spread: float = 1.0,
        ms: float = 5.0,
        kind: str = "recommend",
    ) -> None:
        for _ in range(num):
            scores = self.random.normal(mean, spread, 10)
            self.guards.answered(
                version, [query(kind)], [ranking(version, scores.tolist())], self.random.uniform(ms, 2 * ms)
            )
        self.look()

    def fail(self, version: int, num: int) -> None:
        for _ in range(num):
            self.guards.failed(version, 1)
        self.look()

    def look(self) -> None:
        case = self.guards.due()
        if case is None:
            return
        judgement = judge(self.config, case)
        self.judgements.append(judgement)
        if judgement.guard is None:
            self.guards.passed(judgement)
        else:
            self.guards.turned_away()

    @property
    def trips(self) -> list[tuple[tuple[int, ...], str]]:
        return [(one.case.versions, one.guard) for one in self.judgements if one.guard is not None]


# --- judging ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=30),
    st.lists(st.floats(-5, 5), min_size=1, max_size=30),
)
def test_the_distance_is_the_largest_between_the_cumulative_distributions(one: list[float], other: list[float]) -> None:
    expected = max(
        abs(sum(value <= at for value in one) / len(one) - sum(value <= at for value in other) / len(other))
        for at in [*one, *other]
    )
    assert ks_distance(np.array(one), np.array(other)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_versions_never_trip(seed: int) -> None:
    world = World(seed=seed)
    for version in range(1, 200):
        # Scores drift, loads come and go, single requests fail.
        world.answer(version, mean=0.02 * version, ms=5 + 5 * (version % 7 == 0))
        if version % 10 == 0:
            world.fail(version + 1, 1)
    assert world.trips == []
    assert world.guards.good == 199


def test_a_young_model_whose_scores_move_a_lot_does_not_trip() -> None:
    world = World()
    for version in range(1, 20):
        world.answer(version, mean=5 * (1 - 0.5**version), spread=1 + 2 * (1 - 0.5**version))
    assert world.trips == []


@pytest.mark.parametrize(
    "answers",
    [
        {"mean": 4.0},
        {"mean": -4.0},
        {"spread": 0.0},
        {"spread": 30.0},
        {"spread": 30.0, "kind": "rank"},
    ],
)
def test_scores_that_are_distributed_otherwise_trip(answers: dict[str, Any]) -> None:
    world = World()
    for version in range(1, 8):
        world.answer(version)
        world.answer(version, kind="rank")
    world.answer(8, **answers)
    assert world.trips == [((8,), SCORES)]
    judgement = world.judgements[-1]
    assert judgement.evidence["score_distance"] > judgement.evidence["score_distance_max"] >= 0.3
    assert world.guards.good == 7


def test_failures_trip_before_many_have_failed() -> None:
    world = World()
    world.answer(1)
    world.fail(2, 3)
    assert world.trips == [((2,), FAILURES)]
    assert world.judgements[-1].evidence["failure_share"] == 1.0


def test_failures_that_were_there_before_are_not_the_version_s_fault() -> None:
    world = World()
    for version in range(1, 6):
        for _ in range(12):
            world.guards.answered(version, [query()] * 4, [ranking(version, [0.0])] * 4, 5.0)
            world.guards.failed(version, 1)
        world.look()
    assert world.trips == []


def test_a_slow_version_trips_and_one_that_nobody_notices_does_not() -> None:
    world = World()
    for version in range(1, 8):
        world.answer(version)
    world.answer(8, ms=50)
    assert world.trips == [((8,), LATENCY)]
    world = World(replace(CONFIG, latency_ms_min=200))
    for version in range(1, 8):
        world.answer(version)
    world.answer(8, ms=50)
    assert world.trips == []


def test_versions_that_come_faster_than_answers_are_judged_together() -> None:
    world = World()
    for version in range(1, 6):
        world.answer(version)
    for version in range(6, 16):
        world.answer(version, 5, mean=9)
    assert world.trips == [(tuple(range(6, 16)), SCORES)]
    # What still answers until the worker has gone back is not judged again, and what comes after is.
    world.answer(15, mean=9)
    world.answer(16, mean=9)
    assert world.trips[1:] == [((16,), SCORES)]


def test_answers_by_popularity_say_nothing_about_the_weights() -> None:
    world = World()
    for version in range(1, 6):
        world.answer(version)
    for _ in range(60):
        world.guards.answered(6, [query()], [ranking(6, [99.0] * 10, "no_history")], 5.0)
    world.look()
    assert world.trips == []


def test_what_guards_keep_is_bounded() -> None:
    guards = SwapGuards(CONFIG)
    for _ in range(3_000):
        guards.answered(1, [query()] * 32, [ranking(1, [0.0] * 1_000)] * 32, 5.0)
    case = guards.due()
    assert case is not None
    assert len(case.after.outcomes) == 4_096
    assert len(case.after.batch_ms) == 1_024
    assert len(case.after.scores["recommend"]) == 4_096


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("answers_min", 0),
        ("failure_share_max", 0.0),
        ("score_distance_max", 1.5),
        ("latency_ratio_max", 0.5),
        ("latency_ms_min", -1.0),
        ("cooldown_ms", -1),
        ("check_ms", 0),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"guards\.{setting} = {value}"):
        GuardConfig(**{setting: value})


# --- a worker --------------------------------------------------------------------------------------------------------


def spoil(publisher: Publisher) -> None:
    """Learn something terrible: every score moves far away."""
    items = publisher.recommender.items
    items.bias += 50
    items.dirty[: items.num_items] = True


def mend(publisher: Publisher) -> None:
    items = publisher.recommender.items
    items.bias -= 50
    items.dirty[: items.num_items] = True


async def ask(served: Served, num: int) -> None:
    for n in range(num):
        await served.recommend((7, 8, "anna", "bert")[n % 4], k=10)


def guards_of(served: Served) -> dict[str, Any]:
    guards: dict[str, Any] = served.worker.status()["guards"]  # type: ignore[assignment]
    return guards


async def until_passed(served: Served, version: int) -> None:
    """Ask until `version` has passed."""
    await served.until_version(version)
    deadline_s = time.monotonic() + 30
    while guards_of(served)["passed"] != version:
        assert time.monotonic() < deadline_s, guards_of(served)
        await ask(served, 4)


async def grow_up(town: Town, served: Served) -> None:
    """Versions 2 to 5 pass, so that the guards know what is ordinary."""
    await until_passed(served, 1)
    for version in range(2, 6):
        town.publisher.learn([1, 5])
        town.publisher.publish()
        await until_passed(served, version)


async def test_a_bad_version_is_left_for_the_one_before_and_never_taken_again(
    town: Town, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with town.worker(replace(SERVING, lease_interval_ms=20), version=1, guards=QUICK) as served:
        await grow_up(town, served)
        expected = scores_of(await served.recommend(7))
        spoil(town.publisher)
        town.publisher.publish()
        await served.until_version(6)
        assert scores_of(await served.recommend(7)) != pytest.approx(expected, rel=1e-5)
        await ask(served, 24)
        await served.until_version(5)
        assert scores_of(await served.recommend(7)) == pytest.approx(expected, rel=1e-5)
        # Neither time nor announcements nor a restart bring it back.
        town.announce_snapshot(town.publisher.manifests[-1])
        await ask(served, 24)
        await asyncio.sleep(0.5)
        assert served.worker.snapshot_version == 5
        status = guards_of(served)
        assert (status["trips"], status["last"]["guard"]) == (1, SCORES)
        assert [one["version"] for one in status["rejected"]] == [6]
        listing = (await served.client.get("/admin/snapshots")).json()["snapshots"]
        assert "rejected by one: scores" in listing["versions"][5]["marks"]
        await eventually(lambda: read_leases(town.root, NAME)[0].back_to == 5)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(lines) == 1
    assert lines[0].startswith("going back from version 6 to 5: scores: scores of recommend moved by ")
    assert "score_mean_before" in lines[0]
    async with town.worker(version=5, guards=QUICK, replica="two") as restarted:
        assert scores_of(await restarted.recommend(7)) == pytest.approx(expected, rel=1e-5)
        assert [one["version"] for one in guards_of(restarted)["rejected"]] == [6]


async def test_versions_after_a_bad_one_are_taken_once_the_pause_is_over(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town.worker(version=1, guards=replace(QUICK, cooldown_ms=1_500)) as served:
        await grow_up(town, served)
        spoil(town.publisher)
        town.publisher.publish()
        await served.until_version(6)
        # The next version is out before the worker has gone back, and seen as soon as it is to.
        reader, choice = served.worker._swapper._reader, served.worker._choice
        seen, pointer, turn_away = reader.pointer(), reader.pointer, choice.turn_away
        monkeypatch.setattr(reader, "pointer", lambda: seen)

        def turn_away_and_look(rejections: Iterable[Rejection]) -> None:
            turn_away(rejections)
            monkeypatch.setattr(reader, "pointer", pointer)

        monkeypatch.setattr(choice, "turn_away", turn_away_and_look)
        mend(town.publisher)
        town.publisher.publish()
        await ask(served, 24)
        await served.until_version(5)
        tripped_s = time.monotonic()
        await until_passed(served, 7)
        assert time.monotonic() - tripped_s > 0.5
        assert guards_of(served)["trips"] == 1


async def test_a_version_that_is_being_read_when_the_guards_trip_waits(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town.worker(version=1, guards=replace(QUICK, cooldown_ms=60_000)) as served:
        await grow_up(town, served)
        reader, choice = served.worker._swapper._reader, served.worker._choice
        prepare = reader.prepare

        def trip_while_preparing(**asked: Any) -> PreparedSwap | None:
            prepared = prepare(**asked)
            choice.turn_away([])
            return prepared

        monkeypatch.setattr(reader, "prepare", trip_while_preparing)
        town.publisher.publish()
        await eventually(lambda: choice.waits_s > 0)
        for _ in range(20):  # each waits for what the reading thread was given before, so a swap would be done by then
            await served.worker._swapper.follow()
        assert served.worker.snapshot_version == 5


async def test_what_one_worker_turned_away_others_do_not_take(town: Town) -> None:
    apart = replace(SERVING, snapshot_poll_ms=60_000, snapshot_retry_max_ms=60_000)
    async with (
        town.worker(version=1, guards=QUICK) as served,
        town.worker(apart, version=1, guards=QUICK, replica="two") as other,
    ):
        await grow_up(town, served)
        await other.worker._swapper.follow()
        spoil(town.publisher)
        town.publisher.publish()
        await served.until_version(6)
        await ask(served, 24)
        await served.until_version(5)
        assert not await other.worker._swapper.follow()
        assert other.worker.snapshot_version == 5


async def test_a_pin_is_stronger_than_the_guards(town: Town, caplog: pytest.LogCaptureFixture) -> None:
    async with town.worker(version=1, guards=QUICK) as served:
        await grow_up(town, served)
        spoil(town.publisher)
        town.publisher.publish()
        assert (await served.client.post("/admin/snapshots/6/pin")).status_code == 200
        await until_passed(served, 6)
        assert "version 6 is pinned and stays, although scores" in caplog.text
        assert read_rejections(town.root, NAME) == []


async def test_pinning_a_version_that_was_turned_away_brings_it_back(town: Town) -> None:
    async with town.worker(version=1, guards=QUICK) as served:
        await grow_up(town, served)
        spoil(town.publisher)
        town.publisher.publish()
        await served.until_version(6)
        await ask(served, 24)
        await served.until_version(5)
        assert (await served.client.post("/admin/snapshots/6/pin")).status_code == 200
        await served.until_version(6)


async def test_through_ordinary_swaps_no_guard_trips(town: Town) -> None:
    async with town.worker(version=1, guards=replace(QUICK, latency_ms_min=10_000)) as served:
        for version in range(2, 32):
            town.publisher.learn([version % 10, "film/ten", 100 + version])
            town.publisher.publish("anchor" if version % 8 == 0 else "delta")
            await served.until_version(version)
            await ask(served, 12)
        assert guards_of(served)["trips"] == 0
        assert guards_of(served)["passed"] > 20


async def test_a_version_that_fails_to_answer_is_left(town: Town) -> None:
    async with town.worker(version=1, guards=QUICK) as served:
        await grow_up(town, served)
        guardian, weights = served.worker._guardian, served.worker._weights

        def fail(_queries: Sequence[Query]) -> list[Ranking]:
            raise ZeroDivisionError

        town.publisher.learn([1])
        town.publisher.publish()
        await served.until_version(6)
        failing = guardian.watched(fail, weights)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await served.worker._model_thread.run(lambda: failing([query()]))
        await served.until_version(5)
        assert guards_of(served)["last"]["guard"] == FAILURES


async def test_a_version_that_gives_no_numbers_is_answered_for_by_popularity_and_left(town: Town) -> None:
    async with town.worker(version=1, guards=QUICK) as served:
        await grow_up(town, served)
        expected = scores_of(await served.recommend(7))
        with torch.no_grad():
            town.publisher.recommender.log_scale.fill_(200)  # finite, what it is the logarithm of is not
        town.publisher.publish()
        await served.until_version(6)
        told = await served.recommend(7, k=5)
        ranked = await served.rank(7, [1, 5])
        assert [one["fallback_reason"] for one in (told, ranked)] == [NOT_FINITE] * 2
        assert len(ids_of(told)) == 5
        await ask(served, 4)
        await served.until_version(5)
        assert guards_of(served)["last"]["guard"] == FAILURES
        assert scores_of(await served.recommend(7)) == pytest.approx(expected, rel=1e-5)


async def test_with_its_guards_off_a_worker_follows_whatever_comes(town: Town) -> None:
    async with town.worker(version=1, guards=GuardConfig(enabled=False)) as served:
        spoil(town.publisher)
        town.publisher.publish()
        await served.until_version(2)
        await ask(served, 24)
        assert guards_of(served)["passed"] is None


async def test_others_that_cannot_be_told_do_not_keep_a_worker_from_going_back(
    town: Town, caplog: pytest.LogCaptureFixture
) -> None:
    async with town.worker(version=1, guards=QUICK) as served:
        await grow_up(town, served)
        spoil(town.publisher)
        town.publisher.publish()
        await served.until_version(6)
        (Path(town.root) / NAME / "rejected").write_bytes(b"in the way")
        await ask(served, 24)
        await served.until_version(5)
        assert "version 6 is turned away here, others are not told" in caplog.text
