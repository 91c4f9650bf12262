"""What the API says of itself: bodies, errors, scopes and examples of each route, as OpenAPI."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import msgspec
from fastapi import Response

from serving.access_config import Scope
from serving.messages import (
    TIMEOUT_HEADER,
    AdminAnswer,
    ErrorAnswer,
    EventsAccepted,
    ForgetAccepted,
    RankedCandidates,
    RankRequest,
    Recommendation,
    RecommendRequest,
    ShadowAnswer,
    SnapshotsAnswer,
)
from serving.responding import JSON
from stream.events import Event

_KINDS: Final = (
    RecommendRequest,
    RankRequest,
    Event,
    Recommendation,
    RankedCandidates,
    EventsAccepted,
    ForgetAccepted,
    AdminAnswer,
    SnapshotsAnswer,
    ShadowAnswer,
    ErrorAnswer,
)

ERRORS: Final = {
    400: "The caller went away while it sent the body.",
    401: "No token, or none that is known here.",
    403: "The token does not have the scope.",
    404: "There is no such version or route.",
    408: "The body did not arrive in time.",
    409: "The snapshots do not allow it: damaged, incomplete, or pinned to another version.",
    413: "The body or the list is too large.",
    422: "The content is not acceptable; sending it again will not help.",
    429: "Too much is waiting, or this caller asks too often; Retry-After says when to come back.",
    500: "Our bug; the worker's log says more.",
    503: "Stopping, or what is needed is away; Retry-After says when to come back where that is known.",
    504: "Not answered before the deadline.",
}
"""What a status means; each has `ErrorAnswer` for a body."""

EXAMPLES: Final[Mapping[type[msgspec.Struct], Any]] = {
    RecommendRequest: {"user_id": 5, "k": 3, "exclude": [1343092]},
    RankRequest: {"user_id": "anna", "candidates": [1343092, 1483013, "film/ten"]},
    Event: {
        "event_id": "a1b2",
        "user_id": 5,
        "item_id": 1343092,
        "action": "rating",
        "event_time": "2026-01-31T12:00:00Z",
        "value": 8,
    },
}
"""A body for each route that takes one."""

_ALWAYS: Final = (400, 408, 413, 422, 500, 504)
_GUARDED: Final = (401, 403, 429)
_REQUEST_ID: Final = {"description": "The caller's, or one made here.", "schema": {"type": "string"}}
_PARAMETERS: Final = (
    {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "description": "How long the caller waits (ms); then 504.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
    },
    {
        "name": "x-request-id",
        "in": "header",
        "description": "Comes back, and is in the impressions and the logs.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
    },
)


@cache
def _schemas() -> tuple[dict[str, Any], dict[str, Any]]:
    """References by type name, and the schemas they point at."""
    references, components = msgspec.json.schema_components(_KINDS, ref_template="#/components/schemas/{name}")
    return {kind.__name__: reference for kind, reference in zip(_KINDS, references, strict=True)}, components


def components() -> dict[str, Any]:
    """What the routes refer to."""
    return {
        "schemas": _schemas()[1],
        "securitySchemes": {
            "bearer": {
                "type": "http",
                "scheme": "bearer",
                "description": "Needed once there are access.tokens; `headrace token new` makes one.",
            }
        },
    }


def documented(
    answer: type[msgspec.Struct],
    *,
    scope: Scope,
    request: type[msgspec.Struct] | None = None,
    status: int = 200,
    errors: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Arguments of a route that `respond` answers."""
    extra: dict[str, Any] = {"parameters": list(_PARAMETERS), **_needs(scope)}
    if request is not None:
        extra["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": _body_schema(request), "example": EXAMPLES[request]}},
        }
    success = {
        "description": (answer.__doc__ or "").partition("\n")[0],
        "headers": {"x-request-id": _REQUEST_ID},
        "content": {JSON: {"schema": _schemas()[0][answer.__name__]}},
    }
    failures = {code: _failure(code) for code in sorted({*_ALWAYS, *_GUARDED, *errors})}
    return {
        "status_code": status,
        "response_class": Response,
        "responses": {status: success, **failures},
        "openapi_extra": extra,
    }


def documented_probe(schema: Mapping[str, Any], *, scope: Scope | None = None, media: str = JSON) -> dict[str, Any]:
    """Arguments of a route about the worker itself; `scope`: needed unless access.monitoring_scope says otherwise."""
    content = {media: {"schema": dict(schema)}}
    responses: dict[int, Any] = {200: {"description": "How it is.", "content": content}}
    if scope is None:
        responses[503] = {"description": "Not now, and why.", "content": content}
        return {"response_class": Response, "responses": responses}
    responses |= {code: _failure(code) for code in (401, 403)}
    return {"response_class": Response, "responses": responses, "openapi_extra": _needs(scope)}


def _needs(scope: Scope) -> dict[str, Any]:
    return {"security": [{"bearer": []}], "x-scope": scope}


def _failure(code: int) -> dict[str, Any]:
    headers = {"x-request-id": _REQUEST_ID}
    if code in {429, 503}:
        headers["retry-after"] = {"description": "Seconds.", "schema": {"type": "integer"}}
    return {
        "description": ERRORS[code],
        "headers": headers,
        "content": {JSON: {"schema": _schemas()[0]["ErrorAnswer"]}},
    }


def _body_schema(request: type[msgspec.Struct]) -> dict[str, Any]:
    schema: dict[str, Any] = _schemas()[0][request.__name__]
    return {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]} if request is Event else schema
