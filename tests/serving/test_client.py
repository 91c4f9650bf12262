"""The Python client: against a real worker, and against connections that fail on purpose."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn

from serving.access import new_token
from serving.access_config import AccessConfig
from serving.api import build_api
from serving.calling import ClientConfig
from serving.client import (
    AsyncClient,
    Client,
    offer_candidate,
    pin,
    promote_candidate,
    roll_back,
    shadow,
    snapshots,
    start_shadow,
    status,
    stop_shadow,
    unpin,
    withdraw_candidate,
)
from serving.errors import AnswerRefusedError, ClientDeadlineError, WorkerUnreachableError
from serving.messages import TIMEOUT_HEADER, RankRequest, RecommendRequest
from stream.clock import WallClock
from stream.events import Event
from tests.serving.building import NOW_MS, SERVING, Served, Town, eventually

ANSWER = {
    "request_id": "r",
    "snapshot_version": 1,
    "weights_event_time": None,
    "history_event_time": None,
    "fallback": False,
    "fallback_reason": None,
    "from_session": False,
    "items": [{"item_id": 4, "score": 0.5}],
}
CONFIG = ClientConfig(url="http://worker", timeout_ms=5_000, backoff_first_ms=1)


@asynccontextmanager
async def listening(served: Served) -> AsyncIterator[str]:
    """The URL of a real server in front of a worker."""
    server = uvicorn.Server(uvicorn.Config(build_api(served.worker), port=0, lifespan="off", log_config=None))
    running = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await running


Answering = Callable[[httpx.Request], httpx.Response]


class Scripted:
    """Answers one request after the other as it is told; both kinds of client can be built on it."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers, self.requests = list(answers), list[httpx.Request]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def recommend(self, kind: str, config: ClientConfig = CONFIG) -> Any:
        transport, request = httpx.MockTransport(self), RecommendRequest(user_id=7)
        if kind == "async":
            async with AsyncClient(config, http=httpx.AsyncClient(transport=transport), seed=0) as client:
                return await client.recommend(request)
        with Client(config, http=httpx.Client(transport=transport), seed=0) as waiting:
            return await asyncio.to_thread(waiting.recommend, request)


def refusal(status_code: int, code: str = "queue_full", **headers: str) -> httpx.Response:
    body = {"request_id": "r-9", "error": {"code": code, "message": "not now", "field": "k"}}
    return httpx.Response(status_code, json=body, headers=headers)


both = pytest.mark.parametrize("kind", ["waiting", "async"])


# --- a real worker ---------------------------------------------------------------------------------------------------


async def test_everything_can_be_called_and_comes_back_typed(town: Town) -> None:
    async with town.worker(version=1) as served, listening(served) as url:
        async with AsyncClient(ClientConfig(url=url)) as client:
            recommendation = await client.recommend(RecommendRequest(user_id="anna", k=3))
            assert [type(item.item_id) for item in recommendation.items] == [int] * 3 or len(recommendation.items) == 3
            assert (recommendation.snapshot_version, recommendation.fallback) == (1, False)
            ranked = await client.rank(RankRequest(user_id=7, candidates=[3, "film/ten", 4_000]))
            assert [item.known for item in ranked.items] == [True, True, False]
            event = Event(event_id="e-1", user_id=7, item_id=4, action="view", event_time=NOW_MS)
            assert (await client.send_events([event])).event_ids == ["e-1"]
            assert (await client.forget_user("user/with slash?")).user_id == "user/with slash?"
            assert (await client.forget_user(17)).user_id == 17
            assert (await client.forget_user("17")).user_id == "17"
            assert (await client.call(status()))["replica"] == "one"
        assert len(town.log.records(("commands", 0))) == 3

        def administer() -> None:
            with Client(ClientConfig(url=url)) as waiting:
                again = waiting.recommend(RecommendRequest(user_id="anna", k=3))
                assert [one.item_id for one in again.items] == [one.item_id for one in recommendation.items]
                assert waiting.call(snapshots()).snapshots["current"] == 1
                assert waiting.call(start_shadow(1, share=0.5)).version == 1
                assert (waiting.call(shadow()).shadow or {})["share"] == 0.5
                assert waiting.call(stop_shadow()).version == 1
                assert [waiting.call(one).version for one in (roll_back(1), pin(1), offer_candidate(1))] == [1, 1, 1]
                assert [waiting.call(one).version for one in (promote_candidate(), unpin())] == [1, 1]
                assert waiting.call(withdraw_candidate()).version is None

        await asyncio.to_thread(administer)


@both
async def test_a_refusal_says_what_and_where(town: Town, kind: str) -> None:
    token, entry = new_token("shop", frozenset({"read"}))
    async with town.worker(version=1, access=AccessConfig(tokens=(str(entry),))) as served, listening(served) as url:
        with pytest.raises(AnswerRefusedError, match="401 unauthenticated"):
            await call(kind, ClientConfig(url=url), RecommendRequest(user_id=7))
        known = ClientConfig(url=url, token=token)
        with pytest.raises(AnswerRefusedError, match="422 too_many_items: k asks for 5000") as refused:
            await call(kind, known, RecommendRequest(user_id=7, k=5_000))
        assert (refused.value.field, refused.value.retry_after_s) == ("k", None)
        assert refused.value.request_id
        assert (await call(kind, known, RecommendRequest(user_id=7))).snapshot_version == 1
        assert token not in repr(known)


async def call(kind: str, config: ClientConfig, request: RecommendRequest) -> Any:
    if kind == "async":
        async with AsyncClient(config) as client:
            return await client.recommend(request)
    with Client(config) as waiting:
        return await asyncio.to_thread(waiting.recommend, request)


@both
async def test_a_busy_worker_is_asked_again_and_a_deadline_is_kept(town: Town, kind: str) -> None:
    async with town.worker(replace(SERVING, queue_max=1), version=1) as served, listening(served) as url:
        held = threading.Event()
        blocking = asyncio.create_task(served.worker._model_thread.run(lambda: held.wait(10)))
        started_s = WallClock().monotonic_s()
        with pytest.raises((ClientDeadlineError, AnswerRefusedError)):
            await call(kind, ClientConfig(url=url, timeout_ms=300), RecommendRequest(user_id=7))
        assert WallClock().monotonic_s() - started_s < 5
        held.set()
        await blocking
        assert (await call(kind, ClientConfig(url=url), RecommendRequest(user_id=7))).snapshot_version == 1


# --- connections that fail on purpose --------------------------------------------------------------------------------


@both
async def test_429_and_503_are_tried_again_after_the_time_they_ask_for(kind: str) -> None:
    script = Scripted(refusal(429, **{"retry-after": "1"}), refusal(503, "draining"), httpx.Response(200, json=ANSWER))
    started_s = WallClock().monotonic_s()
    answer = await script.recommend(kind)
    assert answer.items[0].item_id == 4
    assert 1.0 <= WallClock().monotonic_s() - started_s < 4
    left = [int(request.headers[TIMEOUT_HEADER]) for request in script.requests]
    assert left[0] <= 5_000
    assert left[1] <= left[0] - 1_000, "the worker is told what time is left"


@both
async def test_a_connection_that_breaks_is_tried_again(kind: str) -> None:
    script = Scripted(
        httpx.ConnectError("refused"), httpx.RemoteProtocolError("gone"), httpx.Response(200, json=ANSWER)
    )
    assert (await script.recommend(kind)).snapshot_version == 1


@both
async def test_the_last_error_is_told_when_retries_are_used_up(kind: str) -> None:
    script = Scripted(*[refusal(503, "log_unavailable")] * 3)
    with pytest.raises(AnswerRefusedError, match="503 log_unavailable: not now"):
        await script.recommend(kind, replace(CONFIG, retries_max=2))
    assert len(script.requests) == 3
    script = Scripted(*[httpx.ConnectError("refused")] * 2)
    with pytest.raises(WorkerUnreachableError, match="refused"):
        await script.recommend(kind, replace(CONFIG, retries_max=1))


@both
async def test_a_wait_that_would_outlast_the_deadline_is_not_begun(kind: str) -> None:
    script = Scripted(refusal(429, **{"retry-after": "60"}))
    started_s = WallClock().monotonic_s()
    with pytest.raises(AnswerRefusedError, match="429") as refused:
        await script.recommend(kind)
    assert refused.value.retry_after_s == 60
    assert WallClock().monotonic_s() - started_s < 2


@both
@pytest.mark.parametrize("status_code", [400, 401, 403, 404, 413, 422, 500, 504])
async def test_what_will_not_help_is_not_sent_again(kind: str, status_code: int) -> None:
    script = Scripted(refusal(status_code, "no"))
    with pytest.raises(AnswerRefusedError) as refused:
        await script.recommend(kind)
    assert (refused.value.status, refused.value.code, refused.value.field) == (status_code, "no", "k")
    assert len(script.requests) == 1


@both
async def test_what_a_proxy_says_is_told_too(kind: str) -> None:
    script = Scripted(httpx.Response(502, text="<html>Bad Gateway</html>"))
    with pytest.raises(AnswerRefusedError, match="502 http_error: <html>Bad Gateway"):
        await script.recommend(kind)


@both
async def test_an_answer_of_another_form_is_an_error_of_the_call(kind: str) -> None:
    for content in (b"{}", b"<html>Welcome</html>", b"\xff"):
        script = Scripted(httpx.Response(200, content=content))
        with pytest.raises(AnswerRefusedError, match="200 unreadable_answer"):
            await script.recommend(kind)


@both
async def test_an_answer_that_never_comes_is_a_deadline(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = ClientConfig(url=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_ms=200)
        with pytest.raises(ClientDeadlineError):
            await call(kind, config, RecommendRequest(user_id=7))


@both
async def test_the_token_and_only_the_token_s_header_is_sent(kind: str) -> None:
    script = Scripted(httpx.Response(200, json=ANSWER))
    await script.recommend(kind, replace(CONFIG, token="hr_secret"))
    assert script.requests[0].headers["authorization"] == "Bearer hr_secret"
    script = Scripted(httpx.Response(200, json=ANSWER))
    await script.recommend(kind)
    assert "authorization" not in script.requests[0].headers


@pytest.mark.parametrize(
    ("field", "value"), [("url", "localhost:8080"), ("timeout_ms", 0), ("retries_max", -1), ("backoff_first_ms", -1)]
)
def test_settings_that_make_no_sense_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} = {value!r}"):
        ClientConfig(**{field: value})
