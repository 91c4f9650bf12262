"""Around every request: who asks, its deadline, its body, its span, its counts; and the form of every answer."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Final, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.access_config import Scope
from serving.batcher import caller_waiting_until
from serving.config import ServingConfig
from serving.errors import DeadlineExceededError, EventsRefusedError, InvalidRequestError, RequestError
from serving.instruments import ERROR, FALLBACK, OK, REFUSED, REJECTED
from serving.messages import TIMEOUT_HEADER, Answer, ErrorAnswer, ErrorBody
from serving.worker import ServingWorker
from stream.events import UNREADABLE

_tracer = trace.get_tracer("headrace.serving")

JSON: Final = "application/json"
_MILLISECONDS: Final = re.compile(r"[1-9][0-9]{0,8}")
_REQUEST_ID: Final = re.compile(r"[!-~]{1,128}")
_Body = TypeVar("_Body", bound=msgspec.Struct)
Work = Callable[[bytes, str], Awaitable[msgspec.Struct]]
"""From the body and the request's id to the answer."""


async def respond(
    worker: ServingWorker, request: Request, route: str, work: Work, *, scope: Scope, status: int = 200
) -> Response:
    """Answer a request that needs `scope`, whatever happens to it, in the form that callers expect."""
    started_s = worker.clock.monotonic_s()
    request_id = request_id_of(request)
    outcome = ERROR
    with _tracer.start_as_current_span(
        "headrace.serving.request",
        context=_parent(request),
        kind=SpanKind.SERVER,
        attributes={
            "http.request.method": request.method,
            "http.route": route,
            "url.scheme": request.scope["scheme"],
            "headrace.request.id": request_id,
        },
    ) as span:
        status_code = 500
        try:
            request.state.caller = worker.access.admit(request.headers.get("authorization"), host_of(request), scope)
            async with _caller_s_deadline(request) if TIMEOUT_HEADER in request.headers else nullcontext():
                done = await work(await _read_body(request, worker.config), request_id)
            outcome = OK
            if isinstance(done, Answer):
                outcome = FALLBACK if done.fallback else OK
                span.set_attribute("headrace.snapshot.version", done.snapshot_version or 0)
            response, status_code = json_response(done, status), status
        except RequestError as error:
            outcome = REJECTED if error.status in {429, 503, 504} else REFUSED
            response, status_code = error_response(error, request_id), error.status
        finally:
            ended: dict[str, str | int] = {"http.response.status_code": status_code, "headrace.outcome": outcome}
            if status_code >= 500:
                ended["error.type"] = str(status_code)
            span.set_attributes(ended)
            # Within the span: its trace is the example of how long requests take.
            scheme = request.scope["scheme"]
            asked = {"http.request.method": request.method, "http.route": route, "url.scheme": scheme}
            worker.instruments.request_done(route, outcome, worker.clock.monotonic_s() - started_s, asked | ended)
    response.headers["x-request-id"] = request_id
    return response


def _parent(request: Request) -> Context | None:
    """The caller's span, unless something around this application has continued it already."""
    return None if trace.get_current_span().get_span_context().is_valid else propagate.extract(request.headers)


@asynccontextmanager
async def _caller_s_deadline(request: Request) -> AsyncIterator[None]:
    """End what is inside when the caller waits no longer; what still waits for the model is not computed then."""
    given = request.headers[TIMEOUT_HEADER]
    if not _MILLISECONDS.fullmatch(given):
        raise InvalidRequestError(
            f"{TIMEOUT_HEADER} must be whole milliseconds from 1 to 999999999", field=TIMEOUT_HEADER
        )
    try:
        async with asyncio.timeout(int(given) / 1000) as deadline:
            with caller_waiting_until(deadline.when()):
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


def decode(kind: type[_Body], body: bytes) -> _Body:
    """The body as a message. Raises InvalidRequestError, which names the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        _, _, path = str(error).partition(" - at `$.")
        raise InvalidRequestError(str(error), field=path.rstrip("`") or None) from error
    except UNREADABLE as error:
        raise InvalidRequestError(f"the body is not JSON: {error}", code="malformed_json") from error


def host_of(request: Request) -> str:
    """Address that the connection comes from."""
    return "" if request.client is None else request.client.host


def request_id_of(request: Request) -> str:
    """The caller's id of a request, or one made here."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def error_response(error: RequestError, request_id: str) -> Response:
    """What a caller gets instead of an answer."""
    refused = error.refused if isinstance(error, EventsRefusedError) else None
    body = ErrorBody(code=error.code, message=error.message, field=error.field, refused=refused)
    response = _failure(request_id, body, error.status)
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def _failure(request_id: str, body: ErrorBody, status: int) -> Response:
    response = json_response(ErrorAnswer(request_id=request_id, error=body), status)
    response.headers["x-request-id"] = request_id
    return response


async def refused_error(request: Request, error: Exception) -> Response:
    """Handler of RequestError outside of `respond`."""
    assert isinstance(error, RequestError)
    return error_response(error, request_id_of(request))


async def wrong_parameter(request: Request, error: Exception) -> Response:
    """Handler of a path or query that the framework could not read."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return error_response(InvalidRequestError(f"{field}: {first['msg']}", field=field), request_id_of(request))


async def http_error(request: Request, error: Exception) -> Response:
    """Handler of what the framework refuses: no such route, another method."""
    assert isinstance(error, HTTPException)
    body = ErrorBody(code="http_error", message=str(error.detail))
    response = _failure(request_id_of(request), body, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def our_bug(request: Request, _error: Exception) -> Response:
    """Handler of everything else. The server logs the traceback; the caller learns only that it is not their fault."""
    body = ErrorBody(code="internal_error", message="this worker failed to answer; its log says why")
    return _failure(request_id_of(request), body, 500)


def json_response(body: msgspec.Struct | Mapping[str, object], status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(body), status_code=status, media_type=JSON)
