"""The HTTP API of an inference worker. Routes and bodies only; the work is done by what the worker is made of."""

from __future__ import annotations

import platform
from collections.abc import Awaitable, Callable
from importlib.metadata import version as distribution_version
from typing import Any, Final

import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serving.admin_api import add_admin
from serving.errors import InvalidRequestError, RequestError
from serving.messages import (
    EventsAccepted,
    ForgetAccepted,
    RankedCandidates,
    RankRequest,
    Recommendation,
    RecommendRequest,
)
from serving.openapi import components, documented, documented_probe
from serving.responding import (
    decode,
    host_of,
    http_error,
    json_response,
    our_bug,
    refused_error,
    respond,
    wrong_parameter,
)
from serving.worker import ServingWorker
from stream.events import Event
from stream.messages import id_as_written

_FIGURES: Final = {"type": "object"}
_LIVE: Final = {
    "type": "object",
    "required": ["alive", "problem"],
    "properties": {"alive": {"type": "boolean"}, "problem": {"type": ["string", "null"]}},
}
_TEXTS: Final = {"type": "array", "items": {"type": "string"}}
_READY: Final = {
    "type": "object",
    "required": ["ready", "reasons", "impairments"],
    "properties": {"ready": {"type": "boolean"}, "reasons": _TEXTS, "impairments": _TEXTS},
}


_NO_TELEMETRY: Final[Any] = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}
"""Newer versions of FastAPI measure requests, too, under the same names: `respond` does, with what came of them."""

Handler = Callable[[Request], Awaitable[Response]]


class _Api(FastAPI):
    """FastAPI that documents bodies which are not pydantic models, and answers what is asked most without detours."""

    direct: dict[str, Handler]
    """By path: handlers of POST that need nothing of what the framework does around a handler, a quarter of the event
    loop's time for an answer. Whoever adds a middleware has all requests go through it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST" and not self.user_middleware
        handler = self.direct.get(scope["path"]) if is_post else None
        if handler is None:
            await super().__call__(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except Exception as error:
            await (await our_bug(request, error))(scope, receive, send)
            raise  # for the server's log
        await response(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"] = components()
        return document


def build_api(worker: ServingWorker) -> FastAPI:
    """The application that answers for `worker`; starting and stopping the worker is the caller's business."""
    app = _Api(title="headrace serving", version=_version(), telemetry=_NO_TELEMETRY)
    app.direct = {}
    _add_work(app, worker)
    _add_probes(app, worker)
    add_admin(app, worker)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestError, refused_error)
    app.add_exception_handler(RequestValidationError, wrong_parameter)
    app.add_exception_handler(Exception, our_bug)
    return app


def _add_work(app: _Api, worker: ServingWorker) -> None:
    async def recommend(body: bytes, request_id: str) -> Recommendation:
        return await worker.answering.recommend(decode(RecommendRequest, body), request_id)

    async def rank(body: bytes, request_id: str) -> RankedCandidates:
        return await worker.answering.rank(decode(RankRequest, body), request_id)

    async def events(body: bytes, request_id: str) -> EventsAccepted:
        return EventsAccepted(request_id=request_id, event_ids=await worker.intake.accept(body))

    @app.post("/v1/recommend", **documented(Recommendation, scope="read", request=RecommendRequest, errors=(503,)))
    async def post_recommend(request: Request) -> Response:
        """The best items for a user."""
        return await respond(worker, request, "/v1/recommend", recommend, scope="read")

    @app.post("/v1/rank", **documented(RankedCandidates, scope="read", request=RankRequest, errors=(503,)))
    async def post_rank(request: Request) -> Response:
        """Given candidates in order of preference; unknown ones last, without a score."""
        return await respond(worker, request, "/v1/rank", rank, scope="read")

    app.direct |= {"/v1/recommend": post_recommend, "/v1/rank": post_rank}

    @app.post("/v1/events", **documented(EventsAccepted, scope="write", request=Event, status=202, errors=(503,)))
    async def post_events(request: Request) -> Response:
        """One event, or a list of them: all are in the log, or none was sent."""
        return await respond(worker, request, "/v1/events", events, scope="write", status=202)

    @app.delete("/v1/users/{user_id:path}", **documented(ForgetAccepted, scope="write", status=202, errors=(404, 503)))
    async def delete_user(request: Request, user_id: str, *, text: bool = False) -> Response:
        """Have everything about a user removed. `text`: the id is a text, although it looks like a number."""

        async def forget(_body: bytes, request_id: str) -> ForgetAccepted:
            try:
                meant = id_as_written(user_id, as_text=text)
            except ValueError as error:
                raise InvalidRequestError(str(error), field="user_id") from error
            await worker.removal.forget(meant)
            return ForgetAccepted(request_id=request_id, user_id=meant)

        return await respond(worker, request, "/v1/users/{user_id}", forget, scope="write", status=202)


def _add_probes(app: FastAPI, worker: ServingWorker) -> None:
    @app.get("/livez", **documented_probe(_LIVE))
    async def livez() -> Response:
        """503 when only a restart can help."""
        problem = worker.failure
        return json_response({"alive": problem is None, "problem": problem}, 200 if problem is None else 503)

    @app.get("/readyz", **documented_probe(_READY))
    async def readyz() -> Response:
        """503 with the reasons while this worker should get no requests."""
        reasons = worker.reasons_not_ready()
        body = {"ready": not reasons, "reasons": reasons, "impairments": worker.impairments()}
        return json_response(body, 503 if reasons else 200)

    def admit(request: Request) -> None:
        worker.access.admit_monitoring(request.headers.get("authorization"), host_of(request))

    @app.get("/metrics", **documented_probe({"type": "string"}, scope="read", media="text/plain"))
    def metrics(request: Request) -> Response:
        """Prometheus text format."""
        admit(request)
        return Response(worker.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version", **documented_probe(_FIGURES, scope="read"))
    async def version(request: Request) -> Response:
        """What runs here."""
        admit(request)
        return json_response(
            {
                "name": "headrace",
                "version": _version(),
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "snapshot_version": worker.snapshot_version,
            }
        )

    @app.get("/status", **documented_probe(_FIGURES, scope="read"))
    async def status(request: Request) -> Response:
        """Figures of this worker, for people and for the live view."""
        admit(request)
        return json_response(worker.status())


def _version() -> str:
    return distribution_version("headrace")
