"""The API's description of itself is true: whatever is made from it, a worker answers as it says, and never 5xx."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.errors import SchemathesisError
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ops.local_broker import LocalBroker
from serving.access import new_token
from serving.access_config import AccessConfig
from serving.openapi import ERRORS, EXAMPLES
from tests.serving.building import NOW_MS, Served, Town
from tests.serving.process import process, until_ready

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
DOCS = Path(__file__).parents[2] / "docs" / "api.md"


async def document_of(served: Served) -> dict[str, Any]:
    document: dict[str, Any] = (await served.client.get("/openapi.json")).json()
    return document


# --- what it says ----------------------------------------------------------------------------------------------------


async def test_every_route_says_what_it_answers_and_which_scope_it_needs(town: Town) -> None:
    async with town.worker(version=1) as served:
        document = await document_of(served)
    scopes = {"admin": "admin", "events": "write", "{user_id}": "write"}
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (path, method)
            statuses = set(operation["responses"])
            if path in {"/livez", "/readyz"}:
                assert (statuses, "security" in operation) == ({"200", "503"}, False)
                continue
            assert operation["security"] == [{"bearer": []}], path
            assert {"401", "403"} <= statuses
            assert operation["x-scope"] == scopes.get(
                path.split("/")[-1] if "/v1/" in path else path.split("/")[1], "read"
            ), path
            for status in statuses - {"200", "202"}:
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}


async def test_the_document_is_true_of_scopes(town: Town) -> None:
    tokens = {scope: new_token(scope, frozenset({scope})) for scope in ("read", "write", "admin")}
    access = AccessConfig(tokens=tuple(str(entry) for _, entry in tokens.values()))
    async with town.worker(version=1, access=access) as served:
        for path, operations in (await document_of(served))["paths"].items():
            for method, operation in operations.items():
                for scope, (token, _) in tokens.items():
                    response = await served.client.request(
                        method, path.format(user_id=1, version=1), headers={"authorization": f"Bearer {token}"}
                    )
                    is_allowed = operation.get("x-scope") in {None, scope} or scope == "admin"
                    assert (response.status_code != 403) == is_allowed, (path, scope, response.text)


async def test_its_examples_are_answered(town: Town) -> None:
    async with town.worker(version=1) as served:
        document = await document_of(served)
        for path in ("/v1/recommend", "/v1/rank", "/v1/events"):
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            town.clock.advance(max(0, 1_770_000_000_000 - town.clock.now_ms()))
            response = await served.client.post(path, json=body["example"])
            assert response.status_code in {200, 202}, response.text
            schema = {**body["schema"], "components": document["components"]}
            jsonschema_rs.validator_for(schema).validate(body["example"])
    assert len(EXAMPLES) == 3


def test_every_error_is_in_the_documentation() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert not [status for status in ERRORS if not re.search(rf"^\|[^|]*\b{status}\b|\b{status} `", text, re.MULTILINE)]


async def test_the_examples_of_the_documentation_are_answered(town: Town) -> None:
    text = DOCS.read_text(encoding="utf-8")
    commands = re.findall(
        r"^curl -s (?:-X (\w+) )?'?localhost:8080(/\S+?)'?(?=\s)(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    bodies = re.findall(r"`POST (/v1/\w+)`[^`]*`(\{[^`]*\})`", text)
    event = re.search(r'^\{"event_id".*\}$', text, re.MULTILINE)
    assert event is not None
    async with town.worker(version=1) as served:
        town.clock.advance(1_770_000_000_000 - NOW_MS)
        assert (await served.client.post("/v1/events", json=json.loads(event[0]))).status_code == 202
        for path, body in bodies:
            assert (await served.client.post(path, json=json.loads(body))).status_code == 200, body
        for method, path, rest in commands:
            given_body = re.search(r"-d '(\{.*?\})'", rest, re.DOTALL)
            response = await served.client.request(
                method or ("POST" if given_body else "GET"),
                path.replace("/120/", "/1/"),
                content=given_body[1] if given_body else None,
            )
            assert response.status_code == 200, (path, response.text)
    assert len(commands) >= 2
    assert len(bodies) >= 1


# --- whatever is made from it ----------------------------------------------------------------------------------------


def fuzz(url: str, num_examples: int) -> int:
    """Send requests made from the document, valid and not, to every route; how many."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    sent = 0
    for found in schema.get_all_operations():
        operation = found.ok()  # type: ignore[union-attr]
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=num_examples,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def ask(case: Any) -> None:
                nonlocal sent
                # Its own deadline may be too short for anybody.
                case.headers = {**(case.headers or {}), "x-timeout-ms": "30000"}
                response = case.call(timeout=30)
                case.validate_response(response, checks=CHECKS)
                sent += 1

            try:
                ask()
            except (SchemathesisError, Unsatisfiable):
                # A route that takes nothing has nothing that could be wrong.
                if mode is GenerationMode.POSITIVE:
                    raise
    return sent


async def fuzzed(town: Town, tmp_path: Path, broker: LocalBroker, num_examples: int) -> None:
    town.publisher.learn([1, 2])
    town.publisher.publish()
    async with (
        process(tmp_path, broker.bootstrap_servers, serving={"request_timeout_ms": 30_000}) as (running, url),
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        await until_ready(client)
        await until(client, lambda status: status["broker"]["writing"])
        sent = await asyncio.to_thread(fuzz, url, num_examples)
        status = (await client.get("/status")).json()
        assert running.returncode is None
    assert sent > 20 * num_examples // 2
    assert status["errors"] == 0


async def until(client: httpx.AsyncClient, holds: Callable[[Any], bool]) -> None:
    async def look() -> Awaitable[None] | None:
        return None if holds((await client.get("/status")).json()) else asyncio.sleep(0.05)

    for _ in range(400):
        wait = await look()
        if wait is None:
            return
        await wait
    pytest.fail("did not come about in time")


async def test_no_request_that_can_be_made_from_the_document_is_answered_5xx_or_otherwise_than_it_says(
    town: Town, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    await fuzzed(town, tmp_path, fresh_broker, 8)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
async def test_no_request_of_very_many_is_answered_5xx_or_otherwise_than_the_document_says(
    town: Town, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    await fuzzed(town, tmp_path, fresh_broker, 60)
