"""The HTTP API of a worker, over a real store, log and snapshots."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.records import Item
from feature_store.store import FeatureStore
from serving.api import build_api
from serving.ranker import FALLBACK_REASONS
from stream.errors import LogUnavailableError
from stream.events import EventRules
from stream.memory_log import MemoryLog, MemoryWriter
from stream.messages import Command, Impression, decode_message
from stream.tracing import Headers
from tests.serving.building import MODEL, NOW_MS, SERVING, Town, eventually, ids_of, is_connected, scores_of, to_id

EVENT = {"event_id": "e-1", "user_id": "anna", "item_id": 4, "action": "view", "event_time": NOW_MS}


# --- recommend -------------------------------------------------------------------------------------------------------


async def test_an_answer_says_what_it_was_computed_from(town: Town) -> None:
    async with town.worker(version=1) as served:
        answer = await served.recommend(7, k=3)
    assert len(answer.pop("items")) == 3
    assert answer.pop("request_id")
    assert answer == {
        "snapshot_version": 1,
        "weights_event_time": "2023-11-14T22:12:20.000Z",
        "history_event_time": "2023-11-14T21:43:25.000Z",
        "fallback": False,
        "fallback_reason": None,
        "from_session": False,
    }


async def test_scores_are_those_of_the_model_for_this_history_and_time(town: Town) -> None:
    import torch

    from model.batch import HistoryBatch

    recommender = town.publisher.recommender
    rows = recommender.items.lookup(np.array([1, 2, 4, 5]))
    times = [NOW_MS - 1_800_000 + 1_000 * n for n in (1, 2, 4, 5)]
    batch = HistoryBatch(
        rows_L=torch.from_numpy(rows),
        timestamps_ms_L=torch.tensor(times),
        query_times_ms_L=torch.tensor([*times[1:], NOW_MS]),
        offsets=torch.tensor([0, 4]),
    )
    with torch.no_grad():
        expected = recommender.scores(recommender.encode(batch)[-1:])[0]
    async with town.worker(version=1) as served:
        found = scores_of(await served.recommend(7, k=12, exclude_seen=False))
    ids = [int(item) for item in recommender.items.ids()]
    assert {to_id(item): score for item, score in found.items()} == pytest.approx(
        dict(zip(ids, expected.tolist(), strict=True)), rel=1e-5
    )


async def test_items_come_best_first_and_as_many_as_asked_for(town: Town) -> None:
    async with town.worker(version=1) as served:
        answer = await served.recommend(7, k=5)
    scores = [item["score"] for item in answer["items"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)


async def test_what_the_user_has_seen_is_left_out_unless_asked_for(town: Town) -> None:
    async with town.worker(version=1) as served:
        assert {1, 2, 4, 5}.isdisjoint(ids_of(await served.recommend(7, k=12)))
        assert {1, 2, 4, 5} <= set(ids_of(await served.recommend(7, k=12, exclude_seen=False)))


async def test_what_was_seen_longer_ago_than_the_model_reads_is_left_out_too(town: Town) -> None:
    town.happen([(5, n % 10, NOW_MS - 100_000 + n) for n in range(MODEL.max_len + 2)], announced=False)
    async with town.worker(version=1) as served:
        assert set(ids_of(await served.recommend(5, k=12))) == {"film/ten", "film/eleven"}


async def test_excluded_items_are_left_out_by_number_and_by_text(town: Town) -> None:
    async with town.worker(version=1) as served:
        found = ids_of(await served.recommend(7, k=12, exclude=[0, "film/ten", "never heard of"]))
    assert set(found) == {3, 6, 7, 8, 9, "film/eleven"}


async def test_unavailable_items_are_not_recommended_to_anybody(town: Town) -> None:
    async with town.worker(version=1) as served:
        assert 6 in ids_of(await served.recommend(7, k=12))
        with town.store.transaction() as transaction:
            transaction.upsert_items([Item(item_id=6, available=False)])
        for _ in range(200):
            if 6 not in ids_of(await served.recommend(7, k=12)):
                break
            await asyncio.sleep(0.01)
        assert 6 not in ids_of(await served.recommend(7, k=12))
        assert 6 not in ids_of(await served.recommend("nobody", k=12))
        town.publisher.learn([1])
        town.publisher.publish()
        await served.until_version(2)
        assert 6 not in ids_of(await served.recommend(7, k=12))


async def test_an_item_withheld_for_its_unknown_name_appears_once_the_store_names_it(town: Town) -> None:
    async with town.worker(version=1) as served:
        town.publisher.learn(["film/late"])
        town.publisher.publish()
        await served.until_version(2)
        with town.store.transaction() as transaction:
            transaction.register_names("item", {to_id("film/late"): "film/late"})
        for _ in range(200):
            if "film/late" in ids_of(await served.recommend(7, k=20)):
                return
            await asyncio.sleep(0.01)
        pytest.fail("the item kept its hash for a name")


@pytest.mark.parametrize("raw_id", [7, "anna"])
async def test_ids_are_answered_as_their_producers_write_them(town: Town, raw_id: int | str) -> None:
    async with town.worker(version=1) as served:
        everything = ids_of(await served.recommend(raw_id, k=12, exclude_seen=False))
        assert set(everything) == {*range(10), "film/ten", "film/eleven"}
        ranked = await served.rank(raw_id, everything)
        assert ids_of(ranked) == everything
        assert all(item["known"] for item in ranked["items"])


# --- rank ------------------------------------------------------------------------------------------------------------


async def test_rank_and_recommend_agree_on_every_score(town: Town) -> None:
    async with town.worker(version=1) as served:
        recommended = await served.recommend(7, k=12, exclude_seen=False)
        shuffled = sorted(ids_of(recommended), key=str)
        ranked = await served.rank(7, shuffled)
    assert ids_of(ranked) == ids_of(recommended)
    assert scores_of(ranked) == pytest.approx(scores_of(recommended), rel=1e-6)


async def test_unknown_candidates_come_last_without_a_score(town: Town) -> None:
    async with town.worker(version=1) as served:
        for user_id in (7, "nobody"):
            items = (await served.rank(user_id, ["who?", 3, 4_000, "film/ten"]))["items"]
            assert [item["known"] for item in items] == [True, True, False, False]
            assert [item["item_id"] for item in items[2:]] == ["who?", 4_000]
            assert [item["score"] for item in items[2:]] == [None, None]
            assert items[0]["score"] >= items[1]["score"]


# --- fallback --------------------------------------------------------------------------------------------------------


async def test_a_user_without_history_gets_what_is_popular(town: Town) -> None:
    async with town.worker(version=1) as served:
        answer = await served.recommend("nobody", k=3)
        assert (answer["fallback"], answer["fallback_reason"]) == (True, "no_history")
        assert answer["snapshot_version"] == 1
        assert answer["history_event_time"] is None
        # 5 was interacted with four times, 2 three times, all others once.
        assert ids_of(answer) == [5, 2, 0]
        assert ids_of(await served.recommend("nobody", k=2, exclude=[5])) == [2, 0]
        assert [item["item_id"] for item in (await served.rank("nobody", [0, 2, 5]))["items"]] == [5, 2, 0]


async def test_a_history_that_the_weights_know_nothing_of_counts_as_cold(town: Town) -> None:
    town.happen([(50, 4_000, NOW_MS - 1_000)], announced=False)
    async with town.worker(version=1) as served:
        answer = await served.recommend(50)
        assert answer["fallback_reason"] == "history_unknown_to_weights"
        assert answer["history_event_time"] == "2023-11-14T22:13:19.000Z"


async def test_without_any_weights_the_worker_counts_popularity_itself(town: Town) -> None:
    shutil.rmtree(town.root)
    async with town.worker() as served:
        answer = await served.recommend(7)
        assert (answer["fallback_reason"], answer["snapshot_version"], answer["items"]) == ("no_weights", None, [])
        town.happen([(1, "film/ten", NOW_MS), (2, "film/ten", NOW_MS), (1, 3, NOW_MS), (3, 5, NOW_MS)])
        await served.until_applied(4)
        assert ids_of(await served.recommend("nobody")) == ["film/ten", 3, 5]
        assert ids_of(await served.recommend(7)) == ["film/ten", 3]
        assert ids_of(await served.rank(7, [99, 5, "film/ten"])) == ["film/ten", 5, 99]


async def test_with_the_store_away_known_users_are_answered_and_others_get_what_is_popular(town: Town) -> None:
    database = town.root.parent / "store.db"
    async with town.worker(replace(SERVING, store_check_ms=20), version=1) as served:
        expected = (await served.recommend(7))["items"]
        database.rename(database.with_suffix(".away"))
        for suffix in ("-wal", "-shm"):
            database.with_name(f"store.db{suffix}").unlink(missing_ok=True)
        database.mkdir()
        # Open connections would keep the old file: a server that goes away closes them.
        for store in (town.store, served.worker._histories._store):
            store.close()
        await eventually(lambda: not served.worker.status()["store"]["reachable"])  # type: ignore[index]
        both = await asyncio.gather(served.recommend(7), served.recommend(8))
        assert scores_of(both[0]) == pytest.approx({item["item_id"]: item["score"] for item in expected}, rel=1e-5)
        assert not both[0]["fallback"]
        assert both[1]["fallback_reason"] == "store_unavailable"
        assert both[1]["items"]
        response = await served.client.get("/readyz")
        assert response.status_code == 503
        assert any("store" in reason for reason in response.json()["reasons"])
        assert (await served.client.get("/livez")).status_code == 200


def test_every_reason_for_a_fallback_is_explained() -> None:
    assert all(reason and text for reason, text in FALLBACK_REASONS.items())


# --- refused requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "body", "status", "code", "field"),
    [
        ("recommend", b"{", 422, "malformed_json", None),
        ("recommend", b"\xff", 422, "malformed_json", None),
        ("recommend", b"[]", 422, "invalid_request", None),
        ("recommend", b"{}", 422, "invalid_request", None),
        ("recommend", b'{"user_id": -1}', 422, "invalid_request", "user_id"),
        ("recommend", b'{"user_id": 1.5}', 422, "invalid_request", "user_id"),
        ("recommend", b'{"user_id": 9223372036854775808}', 422, "invalid_request", "user_id"),
        ("recommend", b'{"user_id": ""}', 422, "invalid_request", "user_id"),
        ("recommend", b'{"user_id": 1, "k": 0}', 422, "invalid_request", "k"),
        ("recommend", b'{"user_id": 1, "k": 1001}', 422, "too_many_items", "k"),
        ("recommend", b'{"user_id": 1, "exclude_sen": true}', 422, "invalid_request", None),
        ("recommend", b'{"user_id": 1, "exclude": [null]}', 422, "invalid_request", "exclude[0]"),
        ("rank", b'{"user_id": 1, "candidates": []}', 422, "invalid_request", "candidates"),
        ("rank", b'{"user_id": 1, "candidates": [1, 2, 3, 4, 5, 6]}', 422, "too_many_items", "candidates"),
        ("rank", b'{"user_id": 1, "candidates": [' + b"1, " * 200 + b"1]}", 413, "body_too_large", None),
    ],
)
async def test_a_request_that_makes_no_sense_is_refused_with_a_reason(
    town: Town, route: str, body: bytes, status: int, code: str, field: str | None
) -> None:
    async with town.worker(replace(SERVING, candidates_max=5, body_max_bytes=512), version=1) as served:
        response = await served.client.post(f"/v1/{route}", content=body, headers={"x-request-id": "r-1"})
        assert response.status_code == status, response.text
        answer = response.json()
        assert answer["request_id"] == response.headers["x-request-id"] == "r-1"
        assert (answer["error"]["code"], answer["error"].get("field")) == (code, field)
        assert answer["error"]["message"]
        assert served.worker.status()["outcomes"] == {"refused": 1}


async def test_a_full_queue_answers_429_and_says_when_to_come_back(town: Town) -> None:
    async with town.worker(replace(SERVING, queue_max=2), version=1) as served:
        held = threading.Event()
        blocking = asyncio.create_task(served.worker._model_thread.run(lambda: held.wait(5)))
        tasks = [asyncio.create_task(served.client.post("/v1/recommend", json={"user_id": n})) for n in range(20)]
        await asyncio.sleep(0.1)
        held.set()
        responses = await asyncio.gather(*tasks)
        await blocking
        refused = [response for response in responses if response.status_code == 429]
        assert {response.status_code for response in responses} == {200, 429}
        assert refused[0].headers["retry-after"] == "1"
        assert refused[0].json()["error"]["code"] == "queue_full"


async def test_a_request_past_its_deadline_is_answered_504(town: Town) -> None:
    async with town.worker(replace(SERVING, request_timeout_ms=500), version=1) as served:
        held = threading.Event()
        blocking = asyncio.create_task(served.worker._model_thread.run(lambda: held.wait(5)))
        await asyncio.sleep(0)
        response = await served.client.post("/v1/recommend", json={"user_id": 7})
        held.set()
        await blocking
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        assert (await served.recommend(7))["snapshot_version"] == 1


async def test_a_caller_s_own_deadline_is_kept_and_what_it_gave_up_is_not_computed(town: Town) -> None:
    async with town.worker(version=1) as served:
        held = threading.Event()
        blocking = asyncio.create_task(served.worker._model_thread.run(lambda: held.wait(5)))
        first = asyncio.create_task(served.client.post("/v1/recommend", json={"user_id": 8}))
        await asyncio.sleep(0.05)
        started_s = time.monotonic()
        response = await served.client.post("/v1/recommend", json={"user_id": 7}, headers={"x-timeout-ms": "100"})
        waited_s = time.monotonic() - started_s
        held.set()
        await blocking
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "100 ms" in response.json()["error"]["message"]
        assert 0.1 <= waited_s < 2
        assert (await first).status_code == 200
        hot: Any = served.worker.status()["hot"]
        assert hot["resident_users"] == 1, "only the history of the request that waited was read"
        assert (
            await served.client.post("/v1/recommend", json={"user_id": 7}, headers={"x-timeout-ms": "4000"})
        ).json()["snapshot_version"] == 1


@pytest.mark.parametrize("given", ["", "0", "-5", "1.5", "soon", "9999999999"])
async def test_a_deadline_that_is_none_is_refused(town: Town, given: str) -> None:
    async with town.worker(version=1) as served:
        response = await served.client.post("/v1/recommend", json={"user_id": 7}, headers={"x-timeout-ms": given})
        assert (response.status_code, response.json()["error"]["field"]) == (422, "x-timeout-ms")


async def test_a_body_that_does_not_arrive_is_not_waited_for(town: Town) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"user_id"'
        await asyncio.sleep(30)
        yield b": 7}"

    async with town.worker(replace(SERVING, body_timeout_ms=50), version=1) as served:
        response = await served.client.post("/v1/recommend", content=slowly())
        assert (response.status_code, response.json()["error"]["code"]) == (408, "body_timeout")
        assert served.worker.status()["outcomes"] == {"refused": 1}


async def test_unknown_routes_and_methods_are_answered_in_the_same_form(town: Town) -> None:
    async with town.worker(version=1) as served:
        assert (await served.client.get("/v2/nothing")).json()["error"]["code"] == "http_error"
        wrong_method = await served.client.get("/v1/recommend")
        assert wrong_method.status_code == 405
        assert wrong_method.json()["error"]["message"] == "Method Not Allowed"


async def test_a_bug_of_ours_is_a_500_that_tells_the_caller_nothing_more(town: Town) -> None:
    async with town.worker(version=1) as served:
        served.worker._weights.recommender = None  # type: ignore[assignment]
        transport = httpx.ASGITransport(app=build_api(served.worker), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            response = await client.post("/v1/recommend", json={"user_id": 7})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert served.worker.status()["errors"] == 1
        # The worker lives on.
        assert (await served.client.get("/livez")).status_code == 200


# --- events ----------------------------------------------------------------------------------------------------------


async def test_accepted_events_are_in_the_log_when_the_answer_comes(town: Town) -> None:
    async with town.worker(version=1) as served:
        response = await served.client.post("/v1/events", json={**EVENT, "extra": 1})
        assert response.status_code == 202
        assert response.json()["event_ids"] == ["e-1"]
        (record,) = town.log.records(("interactions", 0))
        assert record.key == b"anna"
        assert json.loads(record.value or b"") == {**EVENT, "extra": 1}


async def test_a_list_of_events_is_sent_in_its_order(town: Town) -> None:
    async with town.worker(version=1) as served:
        events = [{**EVENT, "event_id": f"e-{n}", "user_id": n % 3} for n in range(10)]
        response = await served.client.post("/v1/events", json=events)
        assert response.json()["event_ids"] == [f"e-{n}" for n in range(10)]
        records = town.log.records(("interactions", 0))
        assert [json.loads(record.value or b"")["event_id"] for record in records] == [f"e-{n}" for n in range(10)]


@pytest.mark.parametrize(("path", "meant"), [("7", 7), ("anna", "anna"), ("7?text=true", "7"), ("a%20b%40c", "a b@c")])
async def test_deleting_a_user_sends_the_command_to_forget_it(town: Town, path: str, meant: int | str) -> None:
    async with town.worker(version=1) as served:
        response = await served.client.delete(f"/v1/users/{path}")
        assert (response.status_code, response.json()["user_id"]) == (202, meant)
        assert response.json()["request_id"] == response.headers["x-request-id"]
        (record,) = town.log.records((town.log.topics.commands, 0))
        assert decode_message(Command, record.value).user_id == meant


async def test_a_user_that_cannot_exist_is_not_deleted(town: Town) -> None:
    async with town.worker(version=1) as served:
        response = await served.client.delete(f"/v1/users/{2**63}")
        assert (response.status_code, response.json()["error"]["field"]) == (422, "user_id")
        assert town.log.records((town.log.topics.commands, 0)) == []


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"action": "teleport"}, "unknown_action", "action"),
        ({"event_time": -1}, "negative_time", "event_time"),
        ({"event_time": NOW_MS + 3_600_000}, "future_time", "event_time"),
        ({"event_time": "2024-01-01T00:00:00"}, "naive_time", "event_time"),
        ({"user_id": -4}, "wrong_type", "user_id"),
        ({"item_id": None}, "wrong_type", "item_id"),
        ({"schema_version": 0}, "unsupported_schema_version", "schema_version"),
    ],
)
async def test_one_bad_event_refuses_the_list_and_nothing_is_sent(
    town: Town, changes: dict[str, Any], reason: str, field: str
) -> None:
    async with town.worker(version=1) as served:
        response = await served.client.post("/v1/events", json=[EVENT, {**EVENT, **changes}])
        assert response.status_code == 422
        (refused,) = response.json()["error"]["refused"]
        assert (refused["index"], refused["reason"], refused["field"]) == (1, reason, field)
        assert refused["error"]
        assert town.log.records(("interactions", 0)) == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"[]", 422, "invalid_request"),
        (b"[1", 422, "malformed_json"),
        (b"[" * 5_000 + b"]" * 5_000, 422, "malformed_json"),
        (b'{"x": ' * 2_000 + b"1" + b"}" * 2_000, 422, "events_refused"),
        (b"[{},{},{},{}]", 413, "too_many_events"),
    ],
)
async def test_a_body_that_holds_no_usable_list_of_events_is_refused(
    town: Town, body: bytes, status: int, code: str
) -> None:
    async with town.worker(replace(SERVING, events_max=3), version=1) as served:
        response = await served.client.post("/v1/events", content=body)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_an_empty_body_is_refused_like_an_empty_record(town: Town) -> None:
    async with town.worker(version=1) as served:
        response = await served.client.post("/v1/events", content=b"")
        assert response.status_code == 422
        assert response.json()["error"]["refused"][0]["reason"] == "empty"


class AwayLog(MemoryLog):
    """A broker that can be away: nothing connects, nothing is acknowledged."""

    is_away = True

    async def create_topics(self) -> None:
        if self.is_away:
            raise LogUnavailableError("the broker is away")
        await super().create_topics()

    def partition_numbers(self, topic: str) -> list[int]:
        if self.is_away:
            raise LogUnavailableError("the broker is away")
        return super().partition_numbers(topic)

    def writer(self) -> MemoryWriter:
        return AwayWriter(self)


class AwayWriter(MemoryWriter):
    """Its log goes away after it has connected."""

    async def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Any:
        if isinstance(self._log, AwayLog) and self._log.is_away:
            raise LogUnavailableError("the broker is away")
        return await super().send(topic, value, key=key, partition=partition, headers=headers)


async def test_with_the_broker_away_answers_go_on_and_events_are_not_accepted(town: Town) -> None:
    log = AwayLog(town.clock)
    worker = town.build(log=log)
    await worker.start()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=build_api(worker)), base_url="http://worker"
    ) as client:
        await eventually(lambda: worker.snapshot_version == 1)
        response = await client.post("/v1/events", json=EVENT)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "log_unavailable"
        assert (await client.post("/v1/recommend", json={"user_id": 7})).json()["snapshot_version"] == 1
        await eventually(lambda: worker.reasons_not_ready() == [])
        assert worker.status()["broker"] == {
            "reachable": False,
            "problem": "the broker is away",
            "reading": False,
            "writing": False,
        }
        log.is_away = False
        await eventually(lambda: is_connected(worker))
        assert (await client.post("/v1/events", json=EVENT)).status_code == 202
        log.is_away = True
        await eventually(lambda: not is_connected(worker))
        assert (await client.post("/v1/events", json=EVENT)).status_code == 503
        log.is_away = False
    await worker.stop()


# --- impressions -----------------------------------------------------------------------------------------------------


async def test_what_an_answer_showed_is_written_to_the_log(town: Town) -> None:
    async with town.worker(version=1) as served:
        answer = await served.recommend("anna", k=2)
        await eventually(lambda: town.log.records(("impressions", 0)))
    (record,) = town.log.records(("impressions", 0))
    impression = msgspec.json.decode(record.value or b"", type=Impression)
    assert record.key == b"anna"
    assert impression == Impression(
        request_id=answer["request_id"],
        user_id="anna",
        items=ids_of(answer),
        scores=list(scores_of(answer).values()),
        snapshot_version=1,
        shown_at_ms=NOW_MS,
    )


async def test_an_impression_says_where_the_request_came_from(town: Town) -> None:
    rules = EventRules(surface_key="page", surfaces=("home", "3"))
    worker = town.build(rules=rules)
    await worker.start()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=build_api(worker)), base_url="http://worker"
    ) as client:
        for told in ({"surface": "3"}, {"surface": 3}, {"surface": "elsewhere"}, {"surface": None}, {}):
            body = {"user_id": 7, **told}
            assert (await client.post("/v1/recommend", json=body)).status_code == 200
            assert (await client.post("/v1/rank", json=body | {"candidates": [1]})).status_code == 200
        assert (await client.post("/v1/rank", json={"user_id": 7, "candidates": [1], "surface": []})).status_code == 422
        await eventually(lambda: len(town.log.records(("impressions", 0))) == 10)
    await worker.stop()
    shown = [msgspec.json.decode(one.value or b"", type=Impression) for one in town.log.records(("impressions", 0))]
    assert [one.surface for one in shown] == [2, 2, 2, 2, 0, 0, 0, 0, 0, 0]


async def test_impressions_can_be_turned_off(town: Town) -> None:
    async with town.worker(replace(SERVING, log_impressions=False), version=1) as served:
        await served.recommend("anna")
        assert served.worker.status()["impressions"] is None
    assert town.log.records(("impressions", 0)) == []


async def test_impressions_that_cannot_be_written_are_dropped_and_counted(town: Town) -> None:
    log = AwayLog(town.clock)
    worker = town.build(replace(SERVING, impressions_queue_max=3), log=log)
    await worker.start()
    await eventually(lambda: worker.snapshot_version == 1)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=build_api(worker)), base_url="http://worker"
    ) as client:
        for _ in range(6):
            assert (await client.post("/v1/recommend", json={"user_id": 7})).status_code == 200
    assert worker.status()["impressions"]["dropped"] >= 2  # type: ignore[index]
    await worker.stop()


# --- probes ----------------------------------------------------------------------------------------------------------


async def test_a_worker_is_ready_once_weights_are_loaded_and_the_store_answers(town: Town) -> None:
    shutil.rmtree(town.root)
    async with town.worker() as served:
        await eventually(lambda: served.worker.status()["store"]["reachable"])  # type: ignore[index]
        response = await served.client.get("/readyz")
        assert response.status_code == 503
        assert response.json() == {
            "ready": False,
            "reasons": ["no weights are loaded: nothing has been published"],
            "impairments": [],
        }
        town.publisher.publish("anchor")
        await served.until_version(2)
        response = await served.client.get("/readyz")
        assert (response.status_code, response.json()) == (200, {"ready": True, "reasons": [], "impairments": []})


async def test_a_store_without_schema_is_named_in_the_reasons(town: Town) -> None:
    empty = FeatureStore(FeatureStoreConfig(url=f"sqlite:///{town.root.parent / 'empty.db'}"))
    async with town.worker(version=1, store=empty) as served:
        await eventually(lambda: served.worker.status()["store"]["problem"] != "not looked at yet")  # type: ignore[index]
        reasons = (await served.client.get("/readyz")).json()["reasons"]
        assert any("headrace migrate" in reason for reason in reasons)
        assert (await served.recommend(7))["fallback_reason"] == "history_unreadable"
    empty.close()


async def test_weights_that_stay_behind_the_stream_make_a_worker_unready_but_a_quiet_stream_does_not(
    town: Town,
) -> None:
    town.publisher.positions = {0: town.num_events}
    async with town.worker(replace(SERVING, weights_behind_max_ms=60_000), version=1) as served:
        town.clock.advance(24 * 3_600_000)
        assert (await served.client.get("/readyz")).status_code == 200
        town.happen([(7, 3, NOW_MS)])
        await served.until_applied(1)
        assert (await served.client.get("/readyz")).status_code == 200
        town.clock.advance(61_000)
        response = await served.client.get("/readyz")
        assert response.status_code == 503
        assert "weights_behind_max_ms" in response.json()["reasons"][0]
        town.publisher.learn([3])
        town.publisher.positions = {0: town.num_events}
        town.publisher.publish()
        await served.until_version(2)
        assert (await served.client.get("/readyz")).status_code == 200


async def test_with_fail_open_a_worker_stays_ready_without_the_store_and_says_what_is_wrong(town: Town) -> None:
    empty = FeatureStore(FeatureStoreConfig(url=f"sqlite:///{town.root.parent / 'empty.db'}"))
    pointer = town.root / "hstu" / "current.json"
    pointer.rename(pointer.with_name("away"))
    config = replace(SERVING, fail_open=True, weights_behind_max_ms=60_000)
    async with town.worker(config, store=empty) as served:
        await eventually(lambda: served.worker.status()["store"]["problem"] != "not looked at yet")  # type: ignore[index]
        response = await served.client.get("/readyz")
        assert response.status_code == 503, "without any weights nothing but popularity could be answered"
        pointer.with_name("away").rename(pointer)
        await served.until_version(1)
        town.happen([(7, 3, NOW_MS)])
        await served.until_applied(1)
        town.clock.advance(61_000)
        response = await served.client.get("/readyz")
        assert (response.status_code, response.json()["reasons"]) == (200, [])
        impairments = response.json()["impairments"]
        assert len(impairments) == 2
        assert "headrace migrate" in impairments[0]
        assert "weights_behind_max_ms" in impairments[1]
    empty.close()


async def test_weights_have_computed_something_before_a_worker_is_ready(town: Town) -> None:
    from torch.nn.modules.module import register_module_forward_hook

    ready_at_forward: list[bool] = []
    worker = town.build()

    def note(module: object, _input: object, _output: object) -> None:
        ready_at_forward.append(worker.snapshot_version is not None)

    hook = register_module_forward_hook(note)
    try:
        await worker.start()
        await eventually(lambda: worker.reasons_not_ready() == [])
    finally:
        hook.remove()
    assert ready_at_forward
    assert not any(ready_at_forward)
    await worker.stop()


async def test_metrics_version_and_status_are_served(town: Town) -> None:
    async with town.worker(version=1) as served:
        await served.recommend(7)
        metrics = await served.client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert b"python_info" in metrics.content
        version = (await served.client.get("/version")).json()
        assert (version["name"], version["snapshot_version"]) == ("headrace", 1)
        status = (await served.client.get("/status")).json()
        assert status["requests"] == 1
        assert status["snapshot"]["version"] == 1
        assert status["snapshot"]["bytes"] > 1_000
        assert status["swap_pause_ms"]["max"] >= status["swap_pause_ms"]["p50"] > 0
        assert status["hot"]["resident_users"] == 1


async def test_the_api_documents_its_bodies(town: Town) -> None:
    async with town.worker(version=1) as served:
        document = (await served.client.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/v1/recommend",
        "/v1/rank",
        "/v1/events",
        "/v1/users/{user_id}",
        "/admin/snapshots",
        "/admin/snapshots/{version}/rollback",
        "/admin/snapshots/{version}/pin",
        "/admin/pin",
        "/admin/snapshots/{version}/candidate",
        "/admin/candidate",
        "/admin/snapshots/{version}/shadow",
        "/admin/shadow",
        "/admin/candidate/promote",
        "/livez",
        "/readyz",
        "/metrics",
        "/version",
        "/status",
    }
    schemas = document["components"]["schemas"]
    assert {"RecommendRequest", "RankRequest", "Event", "ErrorAnswer"} <= set(schemas)
    assert "user_id" in schemas["RecommendRequest"]["properties"]
