"""Hot swap: every version is served exactly as a fresh worker would serve it, and nothing torn is ever served."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.snapshot import chain, load_snapshot, move_pointer
from serving.errors import SnapshotRefusedError
from serving.instruments import ServingInstruments
from serving.item_names import ItemNames, WithheldItems
from serving.swap import SnapshotReader
from serving.weights import ServedWeights, prepare_swap
from tests.serving.building import (
    MODEL,
    NAME,
    NOW_MS,
    SERVING,
    Publisher,
    Served,
    Town,
    eventually,
    flip_last_byte,
    ids_of,
    redeclare,
    scores_of,
)

USERS: tuple[int | str, ...] = ("anna", 7, 8, 999)


async def everything(served: Served, candidates: list[int | str]) -> dict[str, Any]:
    """All that a worker says, without what names the request."""
    answers: dict[str, Any] = {}
    for user_id in USERS:
        for kind, answer in (
            ("recommend", await served.recommend(user_id, k=500)),
            ("with seen", await served.recommend(user_id, k=500, exclude_seen=False)),
            ("rank", await served.rank(user_id, candidates)),
        ):
            del answer["request_id"]
            answers[f"{user_id} {kind}"] = answer
    return answers


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal but for the order in which a matrix product sums."""
    assert found.keys() == expected.keys()
    for question, answer in found.items():
        other = expected[question]
        assert ids_of(answer) == ids_of(other), question
        assert {**answer, "items": None} == {**other, "items": None}, question
        np.testing.assert_allclose(
            [np.nan if item["score"] is None else item["score"] for item in answer["items"]],
            [np.nan if item["score"] is None else item["score"] for item in other["items"]],
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("precision", ["float32", "int4"])
async def test_after_every_swap_the_answers_are_those_of_a_fresh_worker(town: Town, precision: str) -> None:
    rng = random.Random(4)
    items: list[int | str] = [*range(10), "film/ten", "film/eleven"]
    async with town.worker(version=1) as served:
        for version in range(2, 26):
            new: list[int | str] = [100 + version] if version % 3 == 0 else []
            if version % 5 == 0:
                new.append(f"film/{version}")
            town.happen(
                [(user, item, NOW_MS - 20_000 + version) for user in USERS[:3] for item in rng.sample(items, 1)]
                + [(77, item, NOW_MS) for item in new]
            )
            await served.until_applied(town.num_events - 9)
            town.publisher.learn([*rng.sample(items, 4), *new])
            items += new
            if version == 12:
                town.publisher.recommender.items.remove(np.array([3]))
                items.remove(3)
            # The second may change the precision that the first was published with.
            town.publisher.publish("anchor" if version in {2, 9, 17} else "delta", row_precision=precision)
            await served.until_version(version)
            candidates: list[int | str] = [*items, "film/unheard-of", 3]
            found = await everything(served, candidates)
            async with town.worker(version=version, replica="fresh") as fresh:
                assert_same(found, await everything(fresh, candidates))
        assert served.worker.status()["errors"] == 0
        assert served.worker.status()["snapshot"]["swaps"] == 25  # type: ignore[index]


async def test_answers_under_load_state_the_version_they_were_computed_with(town: Town) -> None:
    num_versions, candidates = 40, list(range(10))
    answers: list[dict[str, Any]] = []
    async with town.worker(version=1) as served:

        async def ask(user_id: int | str) -> None:
            while served.worker.snapshot_version != num_versions:
                answers.append({"user": user_id, **await served.rank(user_id, candidates)})
                answers.append({"user": user_id, **await served.recommend(user_id, k=10)})

        async with asyncio.TaskGroup() as group:
            for user_id in ("anna", 7, 8, 7, "anna", 8):
                group.create_task(ask(user_id))
            for version in range(2, num_versions + 1):
                town.publisher.learn([version % 10, (3 * version) % 10])
                town.publisher.publish("anchor" if version % 15 == 0 else "delta")
                await served.until_version(version)
        assert served.worker.status()["outcomes"] == {"ok": len(answers)}
    told: dict[tuple[int | str, int], dict[int | str, float]] = {}
    versions = {answer["snapshot_version"] for answer in answers}
    assert len(versions) > num_versions / 2, "requests met only a few of the versions"
    for answer in answers:
        of_version = told.setdefault((answer["user"], answer["snapshot_version"]), {})
        for item, score in scores_of(answer).items():
            assert score is not None
            assert of_version.setdefault(item, score) == pytest.approx(score, rel=1e-5, abs=1e-5)
    await compare_with_the_disk(town, told)


async def compare_with_the_disk(town: Town, told: dict[tuple[int | str, int], dict[int | str, float]]) -> None:
    """What was answered during the swaps is what each version answers when nothing else is going on."""
    for version in sorted({version for _, version in told})[::6]:
        move_pointer(town.root, load_snapshot(town.root, NAME, version).manifest)
        async with town.worker(version=version, replica="quiet") as quiet:
            for user_id in ("anna", 7, 8):
                expected = scores_of(await quiet.rank(user_id, [*range(10), "film/ten", "film/eleven"]))
                for item, score in told.get((user_id, version), {}).items():
                    assert score == pytest.approx(expected[item], rel=1e-5, abs=1e-5)


async def test_an_announced_snapshot_is_served_without_waiting_for_the_next_look(town: Town) -> None:
    async with town.worker(
        replace(SERVING, snapshot_poll_ms=30_000, snapshot_retry_max_ms=30_000), version=1
    ) as served:
        town.publisher.learn([1])
        town.announce_snapshot(town.publisher.publish())
        await served.until_version(2)


async def test_a_worker_that_was_left_behind_catches_up_in_one_swap(town: Town) -> None:
    config = replace(SERVING, snapshot_poll_ms=30_000, snapshot_retry_max_ms=30_000)
    async with town.worker(config, version=1) as served:
        for _ in range(3):
            town.publisher.learn([1, 2])
            manifest = town.publisher.publish()
        town.announce_snapshot(manifest)
        await served.until_version(4)
        assert served.worker.status()["snapshot"]["swaps"] == 2  # type: ignore[index]


async def test_moving_the_pointer_back_serves_the_older_version_exactly(town: Town) -> None:
    async with town.worker(version=1) as served:
        before = await everything(served, [1, 2, 3])
        town.publisher.learn([1, 2, 200])
        town.publisher.publish()
        await served.until_version(2)
        assert (await served.recommend(7))["items"] != before["7 recommend"]["items"]
        move_pointer(town.root, load_snapshot(town.root, NAME, 1).manifest)
        await served.until_version(1)
        assert_same(await everything(served, [1, 2, 3]), before)


def corrupt(town: Town) -> None:
    flip_last_byte(town.publisher.folder(2) / "rows.safetensors")


def truncate(town: Town) -> None:
    path = town.publisher.folder(2) / "dense.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def lose_a_file(town: Town) -> None:
    (town.publisher.folder(2) / "rows.safetensors").unlink()


def lose_everything(town: Town) -> None:
    shutil.rmtree(town.publisher.folder(2))


def leave_unfinished(town: Town) -> None:
    (town.publisher.folder(2) / "READY").unlink()


def change_the_manifest(town: Town) -> None:
    flip_last_byte(town.publisher.folder(2) / "manifest.json")


def name_another_model(town: Town) -> None:
    rewrite_manifest(town, config_hash="0" * 64)


def name_a_parent_that_never_was(town: Town) -> None:
    town.publisher.learn([1])
    town.publisher.publish()
    shutil.rmtree(town.publisher.folder(2))


def rewrite_manifest(town: Town, **changes: Any) -> None:
    path = town.publisher.folder(2) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    redeclare(town.publisher.folder(2))


def spoil_with_nan(town: Town) -> None:
    shutil.rmtree(town.publisher.folder(2))
    town.publisher.version = 1
    with torch.no_grad():
        town.publisher.recommender.log_scale.fill_(torch.nan)
    town.publisher.publish()
    with torch.no_grad():
        town.publisher.recommender.log_scale.fill_(3.0)


@pytest.mark.parametrize(
    "spoil",
    [
        corrupt,
        truncate,
        lose_a_file,
        lose_everything,
        leave_unfinished,
        change_the_manifest,
        name_another_model,
        name_a_parent_that_never_was,
        spoil_with_nan,
    ],
)
async def test_a_snapshot_that_cannot_be_used_is_refused_and_the_old_one_keeps_serving(
    town: Town, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(SERVING, snapshot_poll_ms=10)
    held_back = replace(config, snapshot_poll_ms=30_000, snapshot_retry_max_ms=30_000)
    async with town.worker(held_back, version=1) as served, town.worker(config, version=1, replica="eager") as eager:
        before = await everything(served, [1, 2, 3])
        # The eager worker meets the spoiled version over and over; the other one is told of it once it is spoiled.
        town.publisher.learn([1, 2, 3])
        with caplog.at_level(logging.CRITICAL):
            manifest = town.publisher.publish()
            spoil(town)
        town.announce_snapshot(manifest)
        await eventually(lambda: served.worker.status()["snapshot"]["refused"] == 1)  # type: ignore[index]
        await asyncio.sleep(0.1)
        assert_same(await everything(served, [1, 2, 3]), before)
        assert served.worker.status()["errors"] == 0
        # An anchor needs nothing of what was lost.
        town.publisher.version = max(town.publisher.version, 3)
        town.publisher.learn([4])
        town.announce_snapshot(town.publisher.publish("anchor"))
        await served.until_version(4)
        await eager.until_version(4)


async def test_a_refused_snapshot_is_counted_and_logged_once_however_often_it_is_tried(
    town: Town, caplog: pytest.LogCaptureFixture
) -> None:
    async with town.worker(version=1) as served:
        with caplog.at_level(logging.ERROR):
            town.publisher.learn([1])
            town.publisher.publish()
            corrupt_now = load_snapshot(town.root, NAME, 2)
            assert corrupt_now.manifest.version == 2
            await served.until_version(2)
            town.publisher.learn([1])
            name_it = town.publisher.publish
            name_it(config_hash="0" * 64)
            await eventually(lambda: served.worker.status()["snapshot"]["refused"] == 1)  # type: ignore[index]
            await asyncio.sleep(0.5)
        assert [record.message for record in caplog.records if "snapshot 3 is refused" in record.message].__len__() == 1
        assert served.worker.snapshot_version == 2


async def test_a_snapshot_whose_storage_recovers_is_served_after_all(town: Town) -> None:
    town.publisher.learn([1])
    town.publisher.publish()
    hidden = town.root / "elsewhere"
    (town.publisher.folder(2) / "rows.safetensors").rename(hidden)
    async with town.worker(version=1) as served:
        hidden.rename(town.publisher.folder(2) / "rows.safetensors")
        await served.until_version(2)


async def test_a_new_worker_takes_the_newest_version_that_is_whole(town: Town) -> None:
    for _ in range(3):
        town.publisher.learn([1, 2])
        town.publisher.publish()
    flip_last_byte(town.publisher.folder(3) / "rows.safetensors")
    async with town.worker(version=2) as served:
        assert (await served.recommend(7))["snapshot_version"] == 2


@pytest.mark.parametrize(
    "damaged", ["{", "[" * 5_000, "[]", *({"version": version} for version in ("2", 2.0, True, None, [2], 0, -1))]
)
async def test_a_pointer_that_cannot_be_read_changes_nothing_and_is_named(
    town: Town, damaged: str | dict[str, object]
) -> None:
    async with town.worker(version=1) as served:
        pointer = town.root / NAME / "current.json"
        pointer.write_text(
            damaged if isinstance(damaged, str) else json.dumps(json.loads(pointer.read_text()) | damaged)
        )
        await eventually(lambda: served.worker.status()["snapshot"]["pointer_problem"])  # type: ignore[index]
        assert str(pointer) in str(served.worker.status()["snapshot"])
        assert (await served.recommend(7))["snapshot_version"] == 1
        assert served.worker.failure is None


def test_a_chain_is_applied_as_a_whole_or_not_at_all(town_publisher: Publisher) -> None:
    publisher = town_publisher
    publisher.learn(range(10))
    publisher.publish("anchor")
    for _ in range(2):
        publisher.learn([1, 2, 50])
        publisher.publish()
    first, second, third = (load_snapshot(publisher.root, NAME, version) for version in (1, 2, 3))
    weights = ServedWeights(MODEL, WithheldItems(ItemNames(lambda _ids: {})))
    weights.swap(prepare_swap(MODEL, [first]))
    before = {name: tensor.clone() for name, tensor in weights.items.state_dict().items()}
    unfit = replace(third, manifest=replace(third.manifest, parent=1))
    with pytest.raises(Exception, match="changes version 1"):
        weights.swap(prepare_swap(MODEL, [second, unfit]))
    assert weights.info is not None
    assert weights.info.version == weights.recommender.snapshot_version == 1
    for name, tensor in weights.items.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    weights.swap(prepare_swap(MODEL, [second, third]))
    torch.testing.assert_close(
        weights.score(torch.eye(16)), publisher.recommender.scores(torch.eye(16)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("how", ["worked out aside", "not worked out", "worked out for another version"])
def test_a_delta_is_served_exactly_however_it_was_prepared(town_publisher: Publisher, how: str) -> None:
    publisher = town_publisher
    publisher.learn(range(10))
    publisher.publish("anchor")
    weights = ServedWeights(MODEL, WithheldItems(ItemNames(lambda _ids: {})))
    weights.swap(prepare_swap(MODEL, [load_snapshot(publisher.root, NAME, 1)]))
    for version in range(2, 8):
        # The table, the index and the unit vectors outgrow what was allocated.
        publisher.learn([1, 2, *range(500 * version, 500 * version + 300)])
        if version % 2:
            publisher.recommender.items.remove(np.array([version, 500 * (version - 1)]))
        publisher.publish()
        prepared = prepare_swap(MODEL, [load_snapshot(publisher.root, NAME, version)])
        if how != "not worked out":
            prepared = weights.ready(prepared)
        if how == "worked out for another version":
            # Back to the anchor and forward again: the same version, but in another model.
            chain_again = [load_snapshot(publisher.root, NAME, v) for v in range(1, version)]
            weights.swap(weights.ready(prepare_swap(MODEL, chain_again)))
        weights.swap(prepared)
        fresh = ServedWeights(MODEL, weights.withheld)
        fresh.swap(prepare_swap(MODEL, [load_snapshot(publisher.root, NAME, v) for v in range(1, version + 1)]))
        assert weights.info == fresh.info
        states = torch.eye(16)
        torch.testing.assert_close(weights.score(states), fresh.score(states), rtol=1e-6, atol=1e-6)
        rows = torch.from_numpy(weights.items.lookup(publisher.recommender.items.ids()))
        torch.testing.assert_close(
            weights.score(torch.zeros(1, 16))[:, rows], publisher.recommender.scores(torch.zeros(1, 16)), rtol=0, atol=0
        )
        for name, tensor in fresh.items.state_dict().items():
            torch.testing.assert_close(weights.items.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_delta_that_does_not_fit_the_weights_in_service_is_refused_aside(town_publisher: Publisher) -> None:
    publisher = town_publisher
    publisher.learn(range(10))
    publisher.publish("anchor")
    for _ in range(2):
        publisher.learn([1])
        publisher.publish()
    first, _, third = (load_snapshot(publisher.root, NAME, version) for version in (1, 2, 3))
    weights = ServedWeights(MODEL, WithheldItems(ItemNames(lambda _ids: {})))
    weights.swap(prepare_swap(MODEL, [first]))
    with pytest.raises(SnapshotRefusedError, match="version 3 changes version 2, but version 1 is loaded"):
        weights.ready(prepare_swap(MODEL, [third]))


def test_a_reader_for_another_model_configuration_names_the_setting(town_publisher: Publisher) -> None:
    town_publisher.learn([1])
    town_publisher.publish("anchor")
    other = ModelConfig(embedding_dim=8)
    reader = SnapshotReader(town_publisher.root, NAME, other, ServingInstruments())
    assert chain(town_publisher.root, NAME, have=None, want=1) == [1]
    assert reader.prepare(have=None, want=1) is None
    assert "[model]" in reader.refused[1]
