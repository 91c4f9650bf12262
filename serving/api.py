"""The HTTP API of an inference worker. Routes and bodies only; the work is done by what the worker is made of."""

from __future__ import annotations

import asyncio
import platform
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache
from importlib.metadata import version as distribution_version
from typing import Any, Final, TypeVar

import msgspec
import torch
from fastapi import FastAPI, Request, Response
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.access_config import Scope
from serving.config import ServingConfig
from serving.errors import DeadlineExceededError, EventsRefusedError, InvalidRequestError, RequestError
from serving.instruments import ERROR, FALLBACK, OK, REFUSED, REJECTED
from serving.messages import (
    TIMEOUT_HEADER,
    Answer,
    ErrorAnswer,
    ErrorBody,
    EventsAccepted,
    ForgetAccepted,
    RankedCandidates,
    RankRequest,
    Recommendation,
    RecommendRequest,
)
from serving.worker import ServingWorker
from stream.events import Event
from stream.messages import id_as_written

_tracer = trace.get_tracer("headrace.serving")

_JSON: Final = "application/json"
_MILLISECONDS: Final = re.compile(r"[1-9][0-9]{0,8}")
_REQUEST_ID: Final = re.compile(r"[!-~]{1,128}")
_Body = TypeVar("_Body", bound=msgspec.Struct)
_Work = Callable[[bytes, str], Awaitable[msgspec.Struct]]


class _Api(FastAPI):
    """FastAPI that also documents bodies which are not pydantic models."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document.setdefault("components", {}).setdefault("schemas", {}).update(_schemas()[1])
        return document


def build_api(worker: ServingWorker) -> FastAPI:
    """The application that answers for `worker`; starting and stopping the worker is the caller's business."""
    app = _Api(title="headrace serving", version=_version())
    _add_work(app, worker)
    _add_probes(app, worker)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(Exception, _our_bug)
    return app


def _add_work(app: FastAPI, worker: ServingWorker) -> None:
    async def recommend(body: bytes, request_id: str) -> Recommendation:
        return await worker.answering.recommend(_decode(RecommendRequest, body), request_id)

    async def rank(body: bytes, request_id: str) -> RankedCandidates:
        return await worker.answering.rank(_decode(RankRequest, body), request_id)

    async def events(body: bytes, request_id: str) -> EventsAccepted:
        return EventsAccepted(request_id=request_id, event_ids=await worker.intake.accept(body))

    @app.post("/v1/recommend", **_documented(RecommendRequest, Recommendation))
    async def post_recommend(request: Request) -> Response:
        """The best items for a user."""
        return await _respond(worker, request, "/v1/recommend", recommend, scope="read")

    @app.post("/v1/rank", **_documented(RankRequest, RankedCandidates))
    async def post_rank(request: Request) -> Response:
        """Given candidates in order of preference; unknown ones last, without a score."""
        return await _respond(worker, request, "/v1/rank", rank, scope="read")

    @app.post("/v1/events", status_code=202, **_documented(Event, EventsAccepted, status=202))
    async def post_events(request: Request) -> Response:
        """One event, or a list of them: all are in the log, or none was sent."""
        return await _respond(worker, request, "/v1/events", events, scope="write", status=202)

    @app.delete("/v1/users/{user_id}", status_code=202)
    async def delete_user(request: Request, user_id: str, *, text: bool = False) -> Response:
        """Have everything about a user removed. `text`: the id is a text, although it looks like a number."""

        async def forget(_body: bytes, request_id: str) -> ForgetAccepted:
            try:
                meant = id_as_written(user_id, as_text=text)
            except ValueError as error:
                raise InvalidRequestError(str(error), field="user_id") from error
            await worker.removal.forget(meant)
            return ForgetAccepted(request_id=request_id, user_id=meant)

        return await _respond(worker, request, "/v1/users/{user_id}", forget, scope="write", status=202)


def _add_probes(app: FastAPI, worker: ServingWorker) -> None:
    @app.get("/livez")
    async def livez() -> Response:
        """503 when only a restart can help."""
        problem = worker.failure
        return _json({"alive": problem is None, "problem": problem}, 200 if problem is None else 503)

    @app.get("/readyz")
    async def readyz() -> Response:
        """503 with the reasons while this worker should get no requests."""
        reasons = worker.reasons_not_ready()
        body = {"ready": not reasons, "reasons": reasons, "impairments": worker.impairments()}
        return _json(body, 503 if reasons else 200)

    def admit(request: Request) -> None:
        worker.access.admit_monitoring(request.headers.get("authorization"), _host(request))

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        """Prometheus text format."""
        admit(request)
        return Response(worker.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version(request: Request) -> Response:
        """What runs here."""
        admit(request)
        return _json(
            {
                "name": "headrace",
                "version": _version(),
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "snapshot_version": worker.snapshot_version,
            }
        )

    @app.get("/status")
    async def status(request: Request) -> Response:
        """Figures of this worker, for people and for the live view."""
        admit(request)
        return _json(worker.status())


async def _respond(
    worker: ServingWorker, request: Request, route: str, work: _Work, *, scope: Scope, status: int = 200
) -> Response:
    started_s = worker.clock.monotonic_s()
    request_id = _request_id(request)
    outcome = ERROR
    with _tracer.start_as_current_span(
        "headrace.serving.request",
        context=_parent(request),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": request.method, "http.route": route, "headrace.request.id": request_id},
    ) as span:
        try:
            worker.access.admit(request.headers.get("authorization"), _host(request), scope)
            async with _caller_s_deadline(request):
                done = await work(await _read_body(request, worker.config), request_id)
            outcome = OK
            if isinstance(done, Answer):
                outcome = FALLBACK if done.fallback else OK
                span.set_attribute("headrace.snapshot.version", done.snapshot_version or 0)
            response = _json(done, status)
        except RequestError as error:
            outcome = REJECTED if error.status in {429, 503, 504} else REFUSED
            response = _error_response(error, request_id)
        finally:
            worker.instruments.request_done(route, outcome, worker.clock.monotonic_s() - started_s)
        span.set_attribute("http.response.status_code", response.status_code)
        span.set_attribute("headrace.outcome", outcome)
    response.headers["x-request-id"] = request_id
    return response


def _parent(request: Request) -> Context | None:
    """The caller's span, unless something around this application has continued it already."""
    return None if trace.get_current_span().get_span_context().is_valid else propagate.extract(request.headers)


@asynccontextmanager
async def _caller_s_deadline(request: Request) -> AsyncIterator[None]:
    """End what is inside when the caller waits no longer; what still waits for the model is not computed then."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is not None and not _MILLISECONDS.fullmatch(given):
        raise InvalidRequestError(
            f"{TIMEOUT_HEADER} must be whole milliseconds from 1 to 999999999", field=TIMEOUT_HEADER
        )
    try:
        async with asyncio.timeout(None if given is None else int(given) / 1000) as deadline:
            yield
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise DeadlineExceededError(f"no answer within {given} ms ({TIMEOUT_HEADER})") from error


async def _read_body(request: Request, config: ServingConfig) -> bytes:
    chunks, size, limit = [], 0, config.body_max_bytes
    try:
        async with asyncio.timeout(config.body_timeout_ms / 1000):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise InvalidRequestError(
                        f"the body is larger than serving.body_max_bytes ({limit})", status=413, code="body_too_large"
                    )
                chunks.append(chunk)
    except TimeoutError as error:
        raise InvalidRequestError(
            f"the body did not arrive within {config.body_timeout_ms} ms (serving.body_timeout_ms)",
            status=408,
            code="body_timeout",
        ) from error
    except ClientDisconnect as error:
        raise InvalidRequestError("the caller went away", status=400, code="disconnected") from error
    return b"".join(chunks)


def _decode(kind: type[_Body], body: bytes) -> _Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        _, _, path = str(error).partition(" - at `$.")
        raise InvalidRequestError(str(error), field=path.rstrip("`") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is not JSON: {error}", code="malformed_json") from error


def _host(request: Request) -> str:
    return "" if request.client is None else request.client.host


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _error_response(error: RequestError, request_id: str) -> Response:
    refused = error.refused if isinstance(error, EventsRefusedError) else None
    body = ErrorBody(code=error.code, message=error.message, field=error.field, refused=refused)
    response = _json(ErrorAnswer(request_id=request_id, error=body), error.status)
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error_response(error, _request_id(request))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = ErrorBody(code="http_error", message=str(error.detail))
    response = _json(ErrorAnswer(request_id=_request_id(request), error=body), error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _our_bug(request: Request, _error: Exception) -> Response:
    # The server logs the traceback; the caller learns only that it is not their fault.
    body = ErrorBody(code="internal_error", message="this worker failed to answer; its log says why")
    return _json(ErrorAnswer(request_id=_request_id(request), error=body), 500)


def _json(body: msgspec.Struct | Mapping[str, object], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type=_JSON)


def _version() -> str:
    return distribution_version("headrace")


@cache
def _schemas() -> tuple[dict[str, Any], dict[str, Any]]:
    """References by type name, and the schemas they point at."""
    kinds = (RecommendRequest, RankRequest, Event, Recommendation, RankedCandidates, EventsAccepted, ErrorAnswer)
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    return {kind.__name__: reference for kind, reference in zip(kinds, references, strict=True)}, components


def _documented(request: type[msgspec.Struct], answer: type[msgspec.Struct], *, status: int = 200) -> dict[str, Any]:
    references, _ = _schemas()
    schema = references[request.__name__]
    if request is Event:
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return {
        "responses": {
            status: {"content": {_JSON: {"schema": references[answer.__name__]}}},
            "4XX": {"content": {_JSON: {"schema": references["ErrorAnswer"]}}},
        },
        "openapi_extra": {"requestBody": {"required": True, "content": {_JSON: {"schema": schema}}}},
    }
