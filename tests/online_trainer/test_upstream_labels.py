"""The upstream daemon learns its tasks from labels, each once and behind its history, and reads what items are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.ranking_settings import RankingSettings
from model.snapshot import load_snapshot
from model.swap import apply_snapshot
from model.upstream_model import UpstreamModel, UserBatch
from online_trainer.upstream_daemon import UpstreamDaemon
from online_trainer.upstream_learner import UpstreamLearner
from stream.messages import HistoryUpdate, ItemMessage, Labels, encode_message
from tests.online_trainer.conftest import walks
from tests.online_trainer.test_ranking_daemon import labels_of
from tests.online_trainer.test_upstream_daemon import CONFIG, WIDTH, Site, is_up_to_date, running, site, until

__all__ = ["site"]

FROM_LABELS = RankingSettings(tasks=("click",), batch_items=12, max_pending_items=200)
WITH_CONTENT = replace(CONFIG, upstream=replace(CONFIG.upstream, content=True))


def label(site: Site, *labels: Labels) -> None:
    for one in labels:
        site.log.append(site.log.topics.labels, 0, str(one.user_id).encode(), encode_message(one), ())


def learned(status: dict[str, Any]) -> int:
    return int(status["learning"]["labels"]["learned"])


async def test_labels_are_what_tasks_are_learned_from_and_measured_on_and_interactions_what_comes_next(
    site: Site,
) -> None:
    site.happen(200)
    daemon = site.daemon(ranking=FROM_LABELS)
    async with running(daemon):
        before = await until(daemon, is_up_to_date(1, 200))
        label(site, *(labels_of(number, outcome="taken" if number % 3 == 0 else "not_taken") for number in range(12)))
        after = await until(daemon, lambda s: learned(s) == 60)
    assert before["metrics"].keys() == {"loss"}, "what comes next is no task"
    assert before["learning"]["learned"] > 0
    assert after["metrics"]["click.lifetime.count"] == 60
    assert after["metrics"]["click.lifetime.ne"] > 0
    assert after["learning"]["labels"]["unlisted"] == 0


async def test_labels_are_learned_once_over_stops_crashes_and_repetitions(site: Site) -> None:
    site.happen(200)
    label(site, *(labels_of(number) for number in range(8)))
    first = site.daemon(ranking=FROM_LABELS)
    async with running(first):
        await until(first, lambda s: learned(s) == 40)
    label(site, *(labels_of(number) for number in range(4, 16)))
    # This one is killed: what it learned is in no checkpoint.
    kept = {path.name for path in (site.root / "checkpoints").iterdir()}
    killed = site.daemon(ranking=FROM_LABELS, checkpoint_interval_s=3_600)
    async with running(killed):
        await until(killed, lambda s: learned(s) == 80)
    for path in (site.root / "checkpoints").iterdir():
        if path.name not in kept:
            shutil.rmtree(path)
    last = site.daemon(ranking=FROM_LABELS)
    async with running(last):
        status = await until(last, lambda s: learned(s) == 80)
    assert status["learning"]["labels"]["repeated"] == 20
    assert status["label_feed"] == {"pending": 0, "unreadable": 0, "forgotten": 0, "lost": 0}


async def test_labels_wait_for_the_interactions_announced_before_them_and_for_the_store(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.happen(200)
    label(site, labels_of(1))
    seen: list[int] = []
    learn_labels = UpstreamLearner.learn_labels

    def noted(self: UpstreamLearner, batch: Any) -> None:
        seen.append(self.ledger.num_interactions)
        learn_labels(self, batch)

    monkeypatch.setattr(UpstreamLearner, "learn_labels", noted)
    daemon = site.daemon(ranking=FROM_LABELS)
    async with running(daemon):
        await until(daemon, lambda s: learned(s) == 5)
    assert seen == [200]


async def test_a_label_is_learned_behind_what_its_answer_could_have_read(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = walks(200)
    site.stream = replace(stream, arrival_ms=stream.event_time_ms)
    happened = site.happen(200)
    shown_at_ms = int(np.median(happened.event_time_ms))
    label(site, replace_times(labels_of(3), shown_at_ms))
    read: list[UserBatch] = []

    def noted(self: UpstreamModel, examples: Any, *, generator: torch.Generator) -> Any:
        if not examples.is_taken_C.any():
            read.append(examples.users)
        return learning_pass(self, examples, generator=generator)

    learning_pass = UpstreamModel.learning_pass
    monkeypatch.setattr(UpstreamModel, "learning_pass", noted)
    daemon = site.daemon(ranking=FROM_LABELS)
    async with running(daemon):
        await until(daemon, lambda s: learned(s) == 5)
    (users,) = read
    own = happened.event_time_ms[(happened.user_id == 3) & (happened.event_time_ms < shown_at_ms)]
    assert len(own) > 0
    assert users.timestamps_ms_L.tolist() == sorted(own.tolist())[-CONFIG.upstream.max_len :]


def replace_times(labels: Labels, shown_at_ms: int) -> Labels:
    return Labels(
        **{name: getattr(labels, name) for name in labels.__struct_fields__}
        | {"shown_at_ms": shown_at_ms, "from_ms": shown_at_ms}
    )


async def test_labels_of_a_forgotten_user_are_not_learned_from(site: Site) -> None:
    site.happen(200)
    label(site, labels_of(1, user=3), labels_of(2, user=4))
    with site.store.transaction() as transaction:
        transaction.forget_users(np.array([3], np.int64))
    update = HistoryUpdate.forgetting("main", 0, (3,))
    site.log.append(site.log.topics.history_updates, 0, None, update.encode(), ())
    daemon = site.daemon(ranking=FROM_LABELS)
    async with running(daemon):
        status = await until(daemon, lambda s: learned(s) == 5)
    assert status["label_feed"]["forgotten"] == 5


async def test_labels_for_which_there_is_no_time_are_passed_over_and_counted(site: Site) -> None:
    site.happen(200)
    label(site, *(labels_of(number) for number in range(300)))
    # One step, of all interactions, then hardly any time for the next.
    daemon = site.daemon(ranking=FROM_LABELS, learn_share=0.0005, learn_interactions=256)
    async with running(daemon):
        passed_over = await until(daemon, lambda s: s["learning"]["labels_passed_over"] >= 1_200)
        # What has been read since the last were passed over may be more; the next turn sees to that.
        status = await until(daemon, lambda s: s["label_feed"]["pending"] < FROM_LABELS.max_pending_items)
    assert passed_over["learning"]["labels_passed_over"] <= status["learning"]["labels_passed_over"]
    assert learned(status) < 100


async def test_without_learning_no_labels_are_read(site: Site) -> None:
    site.happen(200)
    first = site.daemon(ranking=FROM_LABELS)
    async with running(first):
        await until(first, is_up_to_date(1, 200))
    label(site, labels_of(1))
    second: UpstreamDaemon = site.daemon(ranking=FROM_LABELS, learn_share=0.0)
    async with running(second):
        status = await until(second, is_up_to_date(1, 0))
    assert "label_feed" not in status


def tell(site: Site, items: int, *, kind: str) -> None:
    for item in range(items):
        message = ItemMessage(item_id=item, categories=[kind if item % 2 else "plain"])
        site.log.append(site.log.topics.items, 0, str(item).encode(), encode_message(message), ())


async def test_content_is_in_the_vectors_of_a_version_and_survives_a_restart(site: Site) -> None:
    tell(site, 40, kind="odd")
    site.happen(200)
    daemon = site.daemon(config=WITH_CONTENT)
    async with running(daemon):
        await until(daemon, is_up_to_date(1, 200))
    assert site.check(WITH_CONTENT) == 1, "the content of a version is in its snapshot"
    model = UpstreamModel(WITH_CONTENT)
    apply_snapshot(model, load_snapshot(site.root / "snapshots", "default-upstream", 1))
    content = model.items.content_of(torch.arange(model.items.num_items))
    assert content is not None
    torch.testing.assert_close(content.norm(dim=1), torch.ones(model.items.num_items), atol=2e-3, rtol=0)
    own = site.daemon(config=WITH_CONTENT)._learner
    assert own.items_read == {0: 40}
    for name, tensor in daemon._learner.capture_checkpoint().tensors.items():
        assert torch.equal(own.capture_checkpoint().tensors[name], tensor), name
    # Later versions know what was said later; vectors of this one stay what they are.
    tell(site, 40, kind="even")
    before = site.store.user_states.newest("default", np.arange(30), width=WIDTH).vector
    again = site.daemon(config=WITH_CONTENT)
    site.happen(40)
    async with running(again):
        await until(again, lambda s: s["waiting"] == 0 and s["learning"]["interactions"] == 240)
    assert again._learner.items_read == {0: 80}
    assert site.check(WITH_CONTENT) == 1
    assert not np.array_equal(before, site.store.user_states.newest("default", np.arange(30), width=WIDTH).vector)
