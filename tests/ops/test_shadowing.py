"""`headrace snapshots shadow` against a real worker process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.access import new_token
from tests.ops.command_line import Headrace, assert_refused
from tests.serving.building import Town, build_town, migrated_database
from tests.serving.process import process, until_ready


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    """Two users with histories; version 1 is published."""
    town = build_town(tmp_path, migrated_database(tmp_path))
    town.happen([(7, item, 1_600_000_000_000 + item) for item in range(3)], announced=False)
    town.publisher.learn(range(12))
    town.publisher.publish("anchor")
    yield town
    town.store.close()


async def test_a_version_is_compared_at_a_worker_and_let_go(town: Town, tmp_path: Path, headrace: Headrace) -> None:
    town.publisher.learn(range(12))
    town.publisher.publish()
    token, entry = new_token("operator", frozenset({"admin"}))
    access: dict[str, Any] = {"tokens": [str(entry)]}
    async with process(tmp_path, "127.0.0.1:9", access=access) as (_, url), httpx.AsyncClient(base_url=url) as client:
        await until_ready(client)
        client.headers["authorization"] = f"Bearer {token}"

        async def ask() -> None:
            while True:
                await client.post("/v1/recommend", json={"user_id": 7})

        asking = asyncio.create_task(ask())
        options = ("snapshots", "shadow", "1", "--worker", url, "--share", "1", "--seconds", "1")
        ran = await asyncio.to_thread(headrace, *options, HEADRACE_TOKEN=token)
        (tmp_path / "token").write_text(f"{token}\n")
        as_json = await asyncio.to_thread(headrace, *options, "--json", "--token-file", str(tmp_path / "token"))
        missing = await asyncio.to_thread(headrace, *options[:2], "9", *options[3:], HEADRACE_TOKEN=token)
        refused = await asyncio.to_thread(headrace, *options)
        asking.cancel()
        assert (await client.get("/admin/shadow")).json()["shadow"] is None
    assert ran.returncode == 0, ran
    lines = ran.stdout.splitlines()
    assert lines[0] == "version 1 beside version 2, share 1"
    assert lines[4].startswith("items among the first 10 of both")
    report = json.loads(as_json.stdout)
    assert report["num_compared"] > 0
    assert 0 <= report["overlap_at_10"] <= 1
    assert_refused(missing, "409 snapshot_refused", "version 9")
    assert_refused(refused, "401 unauthenticated")
