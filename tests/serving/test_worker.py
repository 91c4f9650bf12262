"""The life of a worker: start, drain, stop, and the process around it."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from ops.local_broker import LocalBroker
from serving.api import build_api
from serving.config import ServingConfig
from serving.daemon import run_worker
from serving.errors import PortTakenError
from tests.serving.building import SERVING, Town, eventually
from tests.serving.process import process, stderr_of, until_ready


async def test_stopping_answers_what_was_asked_and_refuses_what_comes_after(town: Town) -> None:
    async with town.worker(version=1) as served:
        held = threading.Event()
        blocking = asyncio.create_task(served.worker._model_thread.run(lambda: held.wait(5)))
        asked = [asyncio.create_task(served.client.post("/v1/recommend", json={"user_id": n})) for n in (7, 8)]
        await eventually(lambda: served.worker.status()["waiting"] == 2 or served.worker._batcher.num_waiting == 0)
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(served.worker.stop())
        await asyncio.sleep(0.05)
        late = await served.client.post("/v1/recommend", json={"user_id": 7})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert "stopping" in (await served.client.get("/readyz")).json()["reasons"]
        held.set()
        assert [(await one).status_code for one in asked] == [200, 200]
        await blocking
        await stopping


async def test_a_worker_stops_although_its_model_hangs(town: Town) -> None:
    worker = town.build(replace(SERVING, drain_timeout_ms=100))
    await worker.start()
    held = threading.Event()
    blocking = asyncio.create_task(worker._model_thread.run(lambda: held.wait(1)))
    asked = asyncio.create_task(
        httpx.AsyncClient(transport=httpx.ASGITransport(app=build_api(worker)), base_url="http://worker").post(
            "/v1/recommend", json={"user_id": 7}
        )
    )
    await asyncio.sleep(0.05)
    stopping_s = time.monotonic()
    await worker.stop()
    assert time.monotonic() - stopping_s < 5
    assert worker.reasons_not_ready()[0] == "stopping"
    await blocking
    asked.cancel()


async def test_a_worker_whose_work_ends_by_a_bug_says_that_only_a_restart_helps(town: Town) -> None:
    worker = town.build()
    worker._swapper._reader = None  # type: ignore[assignment]
    await worker.start()
    await worker.wait_until_failed()
    assert worker.failure is not None
    assert "AttributeError" in worker.failure
    transport = httpx.ASGITransport(app=build_api(worker))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        assert (await client.get("/livez")).status_code == 503
    await worker.stop()


async def test_a_port_that_is_taken_is_one_clear_sentence(town: Town) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        parts = town.build()._parts
        with pytest.raises(PortTakenError, match=rf"port {port} on 127\.0\.0\.1 cannot be used .* serving\.port"):
            await asyncio.to_thread(run_worker, replace(parts, config=ServingConfig(port=port)))


async def idle_s(url: str) -> float:
    """How long a connection is kept after an answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /livez HTTP/1.1\r\nHost: worker\r\n\r\n")
    answer = await reader.readuntil(b"}")
    assert b"200 OK" in answer
    answered_s = time.monotonic()
    assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()
    return time.monotonic() - answered_s


async def test_sigterm_drains_and_exits_with_0_while_the_broker_is_away(town: Town, tmp_path: Path) -> None:
    async with (
        process(tmp_path, "127.0.0.1:9", serving={"keep_alive_s": 1}) as (running, url),
        httpx.AsyncClient(base_url=url) as client,
    ):
        await until_ready(client)
        assert (await client.post("/v1/recommend", json={"user_id": 7})).json()["snapshot_version"] == 1
        assert (await client.post("/v1/events", json={})).status_code == 422
        assert (await client.get("/status")).json()["broker"]["reachable"] is False
        assert 0.9 < await idle_s(url) < 20, "an idle connection is closed when serving.keep_alive_s says so"
        started_s = time.monotonic()
        running.send_signal(signal.SIGTERM)
        errors = await stderr_of(running)
        assert await running.wait() == 0, errors
        assert time.monotonic() - started_s < 10
        assert "Traceback" not in errors, errors


async def test_through_swaps_and_sigterm_under_load_no_request_fails(
    town: Town, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    statuses: list[int] = []
    async with (
        process(
            tmp_path, fresh_broker.bootstrap_servers, serving={"drain_notice_ms": 4_000, "drain_timeout_ms": 4_000}
        ) as (running, url),
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        await until_ready(client)
        in_service, told = asyncio.Event(), asyncio.Event()
        in_service.set()

        async def balance() -> None:
            """What a load balancer does: look, and send nothing more to a worker that is not ready."""
            async with httpx.AsyncClient(base_url=url, timeout=20) as probing:
                for _ in range(200):
                    await asyncio.sleep(0.1)
                    if (await probing.get("/readyz")).status_code == 503:
                        break
            in_service.clear()

        async def ask() -> None:
            while in_service.is_set():
                response = await client.post("/v1/recommend", json={"user_id": 7})
                statuses.append(response.status_code)
                if told.is_set() and response.headers.get("connection") == "close":
                    closed.append(response.status_code)

        closed: list[int] = []
        tasks = [asyncio.create_task(ask()) for _ in range(4)]
        for version in range(2, 12):
            town.publisher.learn([1, 2, 300 + version])
            town.publisher.publish()
            await asyncio.sleep(0.05)
        status = (await client.get("/status")).json()
        assert status["snapshot"]["version"] >= 3
        event = {"event_id": "e", "user_id": 7, "item_id": 1, "action": "view", "event_time": 1_700_000_000_000}
        for _ in range(100):
            accepted = await client.post("/v1/events", json=event)
            if accepted.status_code == 202:
                break
            await asyncio.sleep(0.05)
        assert accepted.status_code == 202, accepted.text
        balancing = asyncio.create_task(balance())
        await asyncio.sleep(0.2)
        told.set()
        running.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks, balancing)
        errors = await stderr_of(running)
        assert await running.wait() == 0, errors
        assert "Traceback" not in errors, errors
    assert len(statuses) > 20
    assert set(statuses) == {200}
    assert closed, "what was asked after SIGTERM was answered, and its connection closed"
