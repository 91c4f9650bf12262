"""The upstream daemon on a log: every vector once, of one version at a time, whatever goes wrong."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.errors import StoreUnavailableError
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from model.action_heads import ActionTask
from model.ranking_settings import RankingSettings
from model.snapshot import load_snapshot
from model.swap import apply_snapshot
from model.upstream_config import UpstreamConfig, UpstreamModelConfig
from model.upstream_model import UpstreamModel
from online_trainer.errors import CheckpointMismatchError, UpstreamFencedError
from online_trainer.upstream_daemon import UpstreamDaemon
from online_trainer.upstream_parts import UpstreamParts
from online_trainer.upstream_settings import UpstreamDaemonConfig
from online_trainer.vector_batches import compute
from online_trainer.vector_writer import VectorWriter
from stream.clock import WallClock
from stream.memory_log import MemoryLog
from stream.messages import HistoryUpdate
from tests.online_trainer.conftest import walks

WIDTH = 6
CONFIG = UpstreamModelConfig(
    upstream=UpstreamConfig(
        width=WIDTH,
        embedding_dim=8,
        num_layers=1,
        num_heads=1,
        latent_dim=4,
        head_dim=4,
        ffn_dim=8,
        num_queries=2,
        readout_rank=4,
        max_len=16,
        num_negatives=8,
        task_hidden_dim=4,
        max_items=1_000,
    ),
    tasks=(ActionTask(name="click", kind="bce", action_bit=0),),
    num_actions=32,
)

DEEPER = replace(CONFIG, upstream=replace(CONFIG.upstream, num_layers=2))

FROM_INTERACTIONS = RankingSettings(tasks=("click",), learn_from="interactions")


@dataclass
class Site:
    """A log, a store and the folders of one installation; daemons come and go."""

    log: MemoryLog
    store: FeatureStore
    root: Path
    stream: Interactions = field(default_factory=lambda: walks(2_000))
    num_happened: int = 0

    def daemon(
        self,
        *,
        config: UpstreamModelConfig = CONFIG,
        ranking: RankingSettings = FROM_INTERACTIONS,
        **settings: Any,
    ) -> UpstreamDaemon:
        given: dict[str, Any] = {
            "debounce_ms": 0,
            "batch_users": 8,
            "first_version_interactions": 100,
            "version_interactions": 10**9,
            "checkpoint_interval_s": 0.1,
            "learn_share": 1.0,
            "learn_interactions": 32,
        } | settings
        return UpstreamDaemon(
            UpstreamParts(
                config=UpstreamDaemonConfig(**given),
                model_config=config,
                model_name="default",
                log=self.log,
                store=self.store,
                snapshot_root=self.root / "snapshots",
                checkpoint_root=self.root / "checkpoints",
                clock=WallClock(),
                actions=("click",),
                ranking=ranking,
            )
        )

    def happen(self, count: int, *, ago_ms: int = 0, poll: int = 50) -> Interactions:
        """The next events of the stream, stored and announced as ingest does; they came `ago_ms` before now."""
        happened = self.stream.take(slice(self.num_happened, self.num_happened + count))
        for start in range(0, count, poll):
            first, batch = self.num_happened + start, happened.take(slice(start, start + poll))
            with self.store.transaction() as transaction:
                result = transaction.append(batch)
            update = HistoryUpdate(
                log_id="main",
                partition=0,
                first_offset=first,
                last_offset=first + len(batch) - 1,
                watermark_ms=int(batch.event_time_ms.max()),
                offsets=first + np.arange(len(batch)),
                append_ms=np.full(len(batch), self.log.now_ms() - ago_ms),
                interactions=result.accepted_from(batch),
            )
            self.log.append(self.log.topics.history_updates, 0, None, update.encode(), ())
        self.num_happened += count
        return happened

    def check(self, config: UpstreamModelConfig = CONFIG) -> int:
        """Every user has its vector, made of all that its history holds, by the version in effect; which that is."""
        states = self.store.user_states
        users = states.users_after(-1, limit=10_000)
        found = states.newest("default", users, width=WIDTH)
        current = self.store.read_current(users, max_len=CONFIG.upstream.max_len)
        assert found.is_there.all()
        np.testing.assert_array_equal(found.next_seq, current.next_seq)
        (version,) = set(found.version.tolist())
        model = UpstreamModel(config)
        apply_snapshot(model, load_snapshot(self.root / "snapshots", "default-upstream", version))
        expected = compute(model, version, current, max_tokens=10**6).vectors
        np.testing.assert_allclose(found.vector, expected.vector, rtol=1e-4, atol=1e-5)
        return int(version)


@pytest.fixture
async def site(store: FeatureStore, tmp_path: Path) -> Site:
    log = MemoryLog(WallClock(), log_id="main")
    await log.create_topics()
    return Site(log, store, tmp_path)


@asynccontextmanager
async def running(daemon: UpstreamDaemon) -> AsyncIterator[UpstreamDaemon]:
    stopping = asyncio.Event()
    task = asyncio.create_task(daemon.run(stopping))
    try:
        yield daemon
    finally:
        stopping.set()
        await asyncio.wait_for(task, 30)


async def until(daemon: UpstreamDaemon, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while not condition(status := dict(daemon.status())):
            assert daemon.ready()[1] != "stopped", "it has failed: see the error of its task"
            await asyncio.sleep(0.01)
    return status


def is_up_to_date(version: int, asked: int) -> Callable[[dict[str, Any]], bool]:
    def holds(status: dict[str, Any]) -> bool:
        is_done = status["filling"] is None and status["waiting"] == 0
        return bool(is_done and status["version"] == version and status["asked"] >= asked)

    return holds


async def test_every_user_gets_the_vector_of_its_whole_history(site: Site) -> None:
    site.happen(200)
    daemon = site.daemon()
    async with running(daemon):
        status = await until(daemon, is_up_to_date(1, 200))
        learned = status["learning"]
        assert daemon.ready() == (True, "computing")
    assert site.check() == 1
    assert learned["interactions"] == learned["learned"] + learned["followed"] + learned["passed_over"]
    assert status["metrics"]["click.lifetime.count"] == learned["learned"] > 0
    assert "loss" in status["metrics"]


async def test_more_items_than_there_are_rows_for_make_room_for_each_other(site: Site) -> None:
    site.stream = replace(site.stream, item_id=np.arange(len(site.stream)))
    config = replace(CONFIG, upstream=replace(CONFIG.upstream, max_items=64))
    site.happen(200)
    daemon = site.daemon(config=config, learn_share=1.0)
    async with running(daemon):
        await until(daemon, lambda s: is_up_to_date(1, 200)(s) and s["learning"]["interactions"] == 200)
    assert site.check(config) == 1
    model = UpstreamModel(config)
    apply_snapshot(model, load_snapshot(site.root / "snapshots", "default-upstream", 1))
    assert 32 <= model.items.num_items <= 64


async def test_it_learns_values_too_and_measures_them_in_their_own_unit(site: Site) -> None:
    site.stream = replace(site.stream, value=(20.0 + site.stream.item_id % 7).astype(np.float32))
    watched = ActionTask(name="value", kind="mse", center=20.0, scale=5.0)
    site.happen(200)
    daemon = site.daemon(config=replace(CONFIG, tasks=(*CONFIG.tasks, watched)))
    async with running(daemon):
        status = await until(daemon, is_up_to_date(1, 200))
    metrics = status["metrics"]
    assert metrics["value.lifetime.count"] == status["learning"]["learned"] > 0
    assert 0 < metrics["value.lifetime.rmse"] < 8, "it begins at the center, and values lie within 6 of it"


async def test_events_after_the_first_version_bring_new_vectors_and_their_ages_are_told(site: Site) -> None:
    site.happen(200)
    daemon = site.daemon()
    async with running(daemon):
        await until(daemon, is_up_to_date(1, 200))
        before = daemon.status()["vectors"]
        later = site.happen(40)
        status = await until(daemon, is_up_to_date(1, 240))
        freshness = status["freshness"]["FV"]
    assert site.check() == 1
    users = len(np.unique(later.user_id))
    assert status["vectors"] - before >= users
    assert freshness["append"]["count"] >= 40
    assert freshness["append"]["p99_ms"] < 20_000


async def test_a_new_version_is_filled_aside_and_takes_effect_at_once(site: Site) -> None:
    site.happen(250)
    seen: set[tuple[int, ...]] = set()
    users = np.arange(30)
    daemon = site.daemon(version_interactions=100, version_interval_s=0.0, batch_users=2, backfill_max_age_d=0.0)
    async with running(daemon):
        for _ in range(3):
            await asyncio.sleep(0.05)
            site.happen(50)
            found = site.store.user_states.newest("default", users, width=WIDTH)
            seen.add(tuple(np.unique(found.version[found.is_there]).tolist()))
        async with asyncio.timeout(30):
            while daemon.status()["version"] is None or int(str(daemon.status()["version"])) < 2:
                found = site.store.user_states.newest("default", users, width=WIDTH)
                seen.add(tuple(np.unique(found.version[found.is_there]).tolist()))
                await asyncio.sleep(0.002)
        newest = await until(daemon, lambda s: s["filling"] is None and s["waiting"] == 0 and s["asked"] == 400)
    assert all(len(versions) <= 1 for versions in seen)
    assert site.check() == newest["version"]


async def test_after_a_crash_it_goes_on_where_it_was_and_writes_nothing_twice(site: Site) -> None:
    site.happen(200)
    first = site.daemon(checkpoint_interval_s=3_600)
    async with running(first):
        await until(first, is_up_to_date(1, 200))
    shutil.rmtree(site.root / "checkpoints")  # a crash before the first checkpoint
    positions = site.store.positions("main", "upstream/history-updates")
    assert positions == {0: 4}
    site.happen(100)
    second = site.daemon(first_version_interactions=10**9)
    async with running(second):
        status = await until(second, is_up_to_date(1, 100))
        assert status["learning"]["interactions"] <= 300
    assert site.check() == 1
    assert status["asked"] == 100, "what is below the positions asks for nothing again"


async def test_a_model_begun_anew_need_not_learn_as_much_as_the_one_before_to_be_released(site: Site) -> None:
    site.happen(400)
    first = site.daemon(first_version_interactions=300)
    async with running(first):
        await until(first, is_up_to_date(1, 400))
    shutil.rmtree(site.root / "checkpoints")
    second = site.daemon(version_interactions=200, version_interval_s=0.0)
    async with running(second):
        await until(second, lambda status: status["version"] == 2)
    assert site.check() == 2


async def test_a_version_that_cannot_be_released_is_not_written_again_and_again(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    (site.root / "snapshots").write_text("in the way")
    site.happen(200)
    daemon = site.daemon()
    async with running(daemon):
        await until(daemon, lambda status: status["learning"]["interactions"] == 200)
        site.happen(100)
        await until(daemon, lambda status: status["learning"]["interactions"] == 300)
        await asyncio.sleep(0.2)
    said = [one.message for one in caplog.records if "could be released" in one.message]
    assert len(said) == 1, said


async def test_under_another_configuration_vectors_stay_until_a_version_of_it_takes_effect(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.happen(200)
    first = site.daemon()
    async with running(first):
        await until(first, is_up_to_date(1, 200))
    with pytest.raises(CheckpointMismatchError, match=r"removing .*checkpoints"):
        site.daemon(config=DEEPER)
    shutil.rmtree(site.root / "checkpoints")  # as it advises
    second = site.daemon(config=DEEPER, first_version_interactions=250)
    async with running(second):
        await until(second, lambda status: status["learning"]["interactions"] == 200)
        assert site.store.user_states.newest("default", np.arange(3), width=WIDTH).is_there.all()
        site.happen(100)
        await until(second, lambda status: status["version"] == 2 and status["waiting"] == 0)
    assert "vectors are computed anew once a version of this configuration is learned" in caplog.text
    assert site.check(DEEPER) == 2


async def test_a_back_fill_that_was_interrupted_goes_on_with_the_same_version(site: Site) -> None:
    site.happen(200)
    first = site.daemon(batch_users=1, backfill_max_age_d=0.0)
    async with running(first):
        await until(first, lambda s: s["filling"] is not None and s["filling"]["up_to"] >= 3)
    before = first.status()["filling"]
    second = site.daemon(backfill_max_age_d=0.0)
    async with running(second):
        await until(second, is_up_to_date(1, 0))
    assert before is None or before["version"] == 1  # type: ignore[index]
    assert site.check() == 1


async def test_a_backlog_costs_a_computation_a_user(site: Site) -> None:
    site.happen(200)
    first = site.daemon()
    async with running(first):
        await until(first, is_up_to_date(1, 200))
    # An hour's absence: much has happened, to few.
    hour_ms = 3_600_000
    site.happen(600, ago_ms=hour_ms, poll=5)
    second = site.daemon(debounce_ms=60_000)
    async with running(second):
        status = await until(second, is_up_to_date(1, 600))
    assert site.check() == 1
    assert status["vectors"] <= 2 * 30
    assert status["covered"] > 0
    assert status["freshness"]["FV"]["append"]["p50_ms"] > hour_ms * 0.9


async def test_while_it_is_behind_it_does_not_learn_and_memory_is_bounded(site: Site) -> None:
    daemon = site.daemon(lag_ms=1, batch_users=1, learn_pending_interactions=50, poll_records=1)
    site.happen(400, ago_ms=60_000)
    pending: list[int] = []

    def is_done(status: dict[str, Any]) -> bool:
        pending.append(daemon._batcher.num_pending)
        return bool(status["asked"] == 400 and status["waiting"] == 0)

    async with running(daemon):
        status = await until(daemon, is_done)
    assert max(pending) <= 50 + 50, "what was allowed, and what one poll brings"
    assert status["learning"]["passed_over"] > 0
    assert status["version"] is None, "what was passed over is not enough for a version"


async def test_a_vector_that_is_not_finite_is_refused_named_and_the_one_before_stays(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.happen(200)
    daemon = site.daemon()
    true_vectors = UpstreamModel.user_vectors

    def poisoned(self: UpstreamModel, batch: Any) -> torch.Tensor:
        return true_vectors(self, batch) * torch.nan

    async with running(daemon):
        await until(daemon, is_up_to_date(1, 200))
        before = site.store.user_states.newest("default", np.arange(30), width=WIDTH)
        monkeypatch.setattr(UpstreamModel, "user_vectors", poisoned)
        later = site.happen(20)
        status = await until(daemon, is_up_to_date(1, 220))
        assert daemon.ready()[0]
    after = site.store.user_states.newest("default", np.arange(30), width=WIDTH)
    np.testing.assert_array_equal(before.vector, after.vector)
    assert status["refused"] == len(np.unique(later.user_id))
    assert "not finite; they keep the one before: " in caplog.text
    assert str(int(later.user_id.min())) in caplog.text


async def test_a_version_of_poisoned_vectors_is_given_up_and_the_one_before_stays_in_effect(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.happen(200)
    daemon = site.daemon(version_interactions=100, version_interval_s=0.0, first_version_interactions=150)
    true_vectors = UpstreamModel.user_vectors

    def poisoned(self: UpstreamModel, batch: Any) -> torch.Tensor:
        vectors = true_vectors(self, batch)
        return vectors * torch.nan if self.snapshot_version == 2 else vectors

    monkeypatch.setattr(UpstreamModel, "user_vectors", poisoned)
    async with running(daemon):
        await until(daemon, lambda s: s["version"] == 1)
        site.happen(100)
        await until(daemon, lambda _: "upstream version 2 is given up" in caplog.text)
        assert daemon.status()["version"] == 1
        site.happen(100)
        await until(daemon, is_up_to_date(3, 400))
    assert site.check() == 3


async def test_the_store_away_is_waited_for_and_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.happen(200)
    daemon = site.daemon()

    def away(_self: VectorWriter, _write: Any) -> Any:
        raise StoreUnavailableError("cannot use the feature store")

    async with running(daemon):
        await until(daemon, is_up_to_date(1, 200))
        with monkeypatch.context() as patched:
            patched.setattr(VectorWriter, "commit", away)
            site.happen(50)
            await until(daemon, lambda _: not daemon.ready()[0])
            assert daemon.ready() == (False, "cannot use the feature store")
        await until(daemon, is_up_to_date(1, 250))
        assert daemon.ready()[0]
    assert site.check() == 1


async def test_a_user_forgotten_while_its_vector_is_computed_gets_none(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.happen(200)
    true_vectors = UpstreamModel.user_vectors
    forgotten: list[int] = []

    def forgets_meanwhile(self: UpstreamModel, batch: Any) -> torch.Tensor:
        if not forgotten and len(batch.offsets) > 1:
            forgotten.append(7)
            with site.store.transaction() as transaction:
                transaction.forget_users(np.array(forgotten))
        return true_vectors(self, batch)

    monkeypatch.setattr(UpstreamModel, "user_vectors", forgets_meanwhile)
    daemon = site.daemon(batch_users=64)
    async with running(daemon):
        await until(daemon, is_up_to_date(1, 200))
    assert forgotten == [7]
    found = site.store.user_states.newest("default", np.arange(30), width=WIDTH)
    assert not found.is_there[7]
    assert found.is_there.sum() == 29


async def test_a_user_who_was_forgotten_and_came_back_while_it_was_away_holds_nobody_up(site: Site) -> None:
    site.happen(200)
    first = site.daemon()
    async with running(first):
        await until(first, is_up_to_date(1, 200))
    site.stream.user_id[200:210], site.stream.user_id[400] = 7, 7
    site.happen(200, poll=5)
    with site.store.transaction() as transaction:
        transaction.forget_users(np.array([7]))
    forgetting = HistoryUpdate.forgetting("main", 0, (7,))
    site.log.append(site.log.topics.history_updates, 0, None, forgetting.encode(), ())
    site.happen(1)
    second = site.daemon(poll_records=1, first_version_interactions=10**9, version_interactions=10**9)
    async with running(second):
        status = await until(second, lambda s: is_up_to_date(1, 100)(s) and s["positions"] == {"0": 46})
    assert site.check() == 1
    assert status["asked"] <= 191


async def test_a_second_daemon_is_fenced(site: Site) -> None:
    site.happen(200)
    first = site.daemon()
    stopping = asyncio.Event()
    task = asyncio.create_task(first.run(stopping))
    await until(first, is_up_to_date(1, 200))
    with site.store.transaction() as transaction:
        transaction.lock_position("main", "upstream/history-updates", 0)
        transaction.set_position("main", "upstream/history-updates", 0, 1_000)
    site.happen(50)
    with pytest.raises(UpstreamFencedError, match="another `headrace upstream` writes the vectors"):
        await asyncio.wait_for(task, 30)


async def test_without_learning_it_keeps_the_version_in_effect_up(site: Site) -> None:
    site.happen(200)
    first = site.daemon()
    async with running(first):
        await until(first, is_up_to_date(1, 200))
    site.happen(50)
    second = site.daemon(learn_share=0.0)
    async with running(second):
        status = await until(second, is_up_to_date(1, 50))
    assert site.check() == 1
    assert status["asked"] == 50


def test_an_action_that_is_not_declared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"upstream_daemon\.actions names buy: declared in events\.actions are click"):
        UpstreamDaemonConfig(actions=("buy",)).action_mask(("click",))
