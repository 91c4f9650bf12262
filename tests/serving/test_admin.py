"""The routes for operators."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from model.snapshot import read_candidate, read_pin, read_pointer
from serving.access import new_token
from serving.access_config import AccessConfig
from tests.serving.building import NAME, SERVING, Served, Town, eventually, flip_last_byte, scores_of


@pytest.fixture
def published(town: Town) -> Town:
    """Versions 1 to 3."""
    for _ in range(2):
        town.publisher.learn([1, 2, 3, 5])
        town.publisher.publish()
    return town


async def post(served: Served, path: str, status: int = 200) -> dict[str, Any]:
    response = await served.client.post(f"/admin/{path}")
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def pointers(town: Town) -> list[int | None]:
    """Current, pinned, candidate."""
    found = (read(town.root, NAME) for read in (read_pointer, read_pin, read_candidate))
    return [None if one is None else one.version for one in found]


async def test_versions_are_listed_with_what_is_to_be_said_of_them(published: Town) -> None:
    async with published.worker(replace(SERVING, lease_interval_ms=20), version=3) as served:
        await eventually(lambda: served.worker._lease._loading is None)
        answer = (await served.client.get("/admin/snapshots")).json()
    versions = {one["version"]: one for one in answer["snapshots"]["versions"]}
    assert set(versions) == {1, 2, 3}
    assert (versions[1]["kind"], versions[2]["parent"]) == ("anchor", 1)
    assert "current" in versions[3]["marks"]
    assert (answer["snapshots"]["current"], answer["snapshots"]["pinned"]) == (3, None)
    assert answer["request_id"]


async def test_rolling_back_pinning_and_unpinning_move_the_worker_at_once_and_tell_the_others(published: Town) -> None:
    config = replace(SERVING, snapshot_poll_ms=60_000, snapshot_retry_max_ms=60_000)
    async with published.worker(config, version=3) as served:
        at_3 = scores_of(await served.recommend(7))
        assert (await post(served, "snapshots/1/rollback"))["version"] == 1
        await served.until_version(1)
        assert (await post(served, "snapshots/2/pin"))["version"] == 2
        await served.until_version(2)
        published.publisher.learn([1])
        published.publisher.publish()
        assert pointers(published) == [2, 2, None]
        response = await served.client.delete("/admin/pin")
        assert (response.status_code, response.json()["version"]) == (200, 4)
        await served.until_version(4)
        assert (await served.client.delete("/admin/pin")).json()["version"] is None
        assert (await post(served, "snapshots/3/rollback"))["version"] == 3
        await served.until_version(3)
        assert scores_of(await served.recommend(7)) == pytest.approx(at_3, rel=1e-5)
    announced = [record.value or b"" for record in published.log.records(("snapshots", 0))]
    assert len(announced) == 4


async def test_a_canary_tries_the_candidate_and_the_others_follow_when_it_is_promoted(published: Town) -> None:
    canary = replace(SERVING, channel="candidate")
    async with published.worker(version=3) as others, published.worker(canary, version=3, replica="canary") as served:
        await post(others, "snapshots/3/pin")
        published.publisher.learn([1, 4, 5])
        published.publisher.publish()
        await post(others, "snapshots/4/candidate")
        assert pointers(published) == [3, 3, 4]
        await served.until_version(4)
        assert others.worker.snapshot_version == 3
        assert (await post(others, "candidate/promote"))["version"] == 4
        await others.until_version(4)
        assert pointers(published) == [4, 4, None]
        await post(others, "snapshots/2/candidate")
        await served.until_version(2)
        response = await served.client.delete("/admin/candidate")
        assert (response.status_code, response.json()["version"]) == (200, 2)
        await served.until_version(4)
        assert pointers(published) == [4, 4, None]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("snapshots/9/pin", 404, "no_such_snapshot"),
        ("snapshots/9/rollback", 404, "no_such_snapshot"),
        ("snapshots/9/candidate", 404, "no_such_snapshot"),
        ("candidate/promote", 404, "no_such_snapshot"),
        ("snapshots/2/pin", 409, "snapshot_refused"),
        ("snapshots/3/candidate", 409, "snapshot_refused"),
        ("snapshots/0/pin", 422, "invalid_request"),
        ("snapshots/newest/pin", 422, "invalid_request"),
        ("snapshots/99999999999999999999/pin", 422, "invalid_request"),
    ],
)
async def test_what_cannot_be_done_changes_nothing(published: Town, path: str, status: int, code: str) -> None:
    async with published.worker(version=3) as served:
        flip_last_byte(published.publisher.folder(2) / "rows.safetensors")
        error = (await post(served, path, status))["error"]
        assert error["code"] == code
        assert error["message"]
        assert served.worker.snapshot_version == 3
    assert pointers(published) == [3, None, None]


async def test_a_storage_that_is_away_is_the_reason_given(published: Town) -> None:
    async with published.worker(version=3) as served:
        published.root.rename(published.root.with_name("away"))
        published.root.write_bytes(b"")
        error = (await post(served, "snapshots/1/rollback", 503))["error"]
        assert error["code"] == "snapshots_unavailable"
        published.root.unlink()
        published.root.with_name("away").rename(published.root)


async def test_only_admins_are_let_in_and_what_they_do_is_in_the_log_with_their_name(
    published: Town, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tokens = {scope: new_token(scope, frozenset({scope})) for scope in ("read", "write", "admin")}
    access = AccessConfig(tokens=tuple(str(entry) for _, entry in tokens.values()))
    async with published.worker(version=3, access=access) as served:
        for method, path in (
            ("GET", "/admin/snapshots"),
            ("POST", "/admin/snapshots/1/rollback"),
            ("POST", "/admin/snapshots/1/pin"),
            ("DELETE", "/admin/pin"),
            ("POST", "/admin/snapshots/1/candidate"),
            ("POST", "/admin/candidate/promote"),
            ("DELETE", "/admin/candidate"),
        ):
            assert (await served.client.request(method, path)).status_code == 401
            for scope in ("read", "write"):
                headers = {"authorization": f"Bearer {tokens[scope][0]}"}
                assert (await served.client.request(method, path, headers=headers)).status_code == 403
        assert pointers(published) == [3, None, None]
        headers = {"authorization": f"Bearer {tokens['admin'][0]}", "x-request-id": "r-7"}
        assert (await served.client.post("/admin/snapshots/1/pin", headers=headers)).status_code == 200
        assert (await served.client.post("/admin/snapshots/8/pin", headers=headers)).status_code == 404
    audit = [record.getMessage() for record in caplog.records if record.name == "headrace.audit"]
    assert audit[0] == "pin to version 1, asked for by admin at 127.0.0.1 (request r-7): done"
    assert audit[1].startswith("pin to version 8, asked for by admin at 127.0.0.1 (request r-7): refused, ")
    assert not any(token in caplog.text for token, _ in tokens.values())
