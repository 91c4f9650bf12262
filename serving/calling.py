"""What a client does about one call, without any input or output: requests, waits, retries, deadline, errors."""

from __future__ import annotations

import random
import ssl
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeAlias, TypeVar

import httpx
import msgspec

from serving.errors import AnswerRefusedError, ClientDeadlineError, WorkerUnreachableError
from serving.messages import TIMEOUT_HEADER, ErrorAnswer, ErrorBody
from stream.clock import Clock
from stream.events import UNREADABLE

Answer = TypeVar("Answer")

_RETRIED: Final = frozenset({429, 503})


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientConfig:
    """How a client calls a worker, or the load balancer in front of several."""

    url: str = "http://127.0.0.1:8080"
    """Where it listens."""
    token: str | None = field(default=None, repr=False)
    """Bearer token; None where none is needed."""
    timeout_ms: int = 2_000
    """Time (ms) for a call with everything it does, retries and waits between them; workers are told what is left."""
    retries_max: int = 3
    """Attempts after the first, after 429, 503, or a connection that failed; 504 and other answers are final."""
    backoff_first_ms: int = 50
    """Longest wait (ms) before the first retry where no Retry-After says more. It doubles each time, and a random share
    of it is taken, so that callers who failed together do not come back together."""
    ca_file: str | None = None
    """Certificates (PEM) to verify the worker with; None: the system's."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url = {self.url!r}: must begin with http:// or https://")
        if self.timeout_ms < 1:
            raise ValueError(f"timeout_ms = {self.timeout_ms}: must be at least 1")
        for name in ("retries_max", "backoff_first_ms"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")

    def tls(self) -> ssl.SSLContext:
        """What the worker is verified with."""
        return ssl.create_default_context(cafile=self.ca_file)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[Answer]):
    """One call of an API route. Every route may be called twice: the second time changes nothing."""

    method: str
    path: str
    answer: type[Answer]
    body: bytes | None = None
    params: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """Send this, and come back with the response or the error."""

    method: str
    url: str
    content: bytes | None
    params: Mapping[str, Any] | None
    headers: dict[str, str]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait so many seconds."""

    seconds: float


Step: TypeAlias = Send | Wait
Result: TypeAlias = httpx.Response | httpx.TransportError | None
"""Of a Send; None of a Wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Makes calls into steps; whoever has the connection takes them."""

    config: ClientConfig
    clock: Clock
    random: random.Random

    def steps(self, call: Call[Answer]) -> Generator[Step, Result, Answer]:
        """Steps of one call. Raises AnswerRefusedError, WorkerUnreachableError or ClientDeadlineError."""
        deadline_s, attempt = self.clock.monotonic_s() + self.config.timeout_ms / 1000, 0
        while True:
            result = yield self._send(call, deadline_s - self.clock.monotonic_s())
            if isinstance(result, httpx.Response) and result.is_success:
                return _decoded(result, call.answer)
            error = _error_of(result)
            if attempt >= self.config.retries_max or not _is_retried(error):
                raise error
            wait_s = self._wait_s(error, attempt)
            if self.clock.monotonic_s() + wait_s >= deadline_s:
                # It would be too late by then: what went wrong says more than that time is up.
                raise error
            yield Wait(wait_s)
            attempt += 1

    def _send(self, call: Call[Answer], left_s: float) -> Send:
        if left_s <= 0:
            raise ClientDeadlineError(f"{call.method} {call.path} took longer than {self.config.timeout_ms} ms")
        headers = {"content-type": "application/json", TIMEOUT_HEADER: str(max(1, int(left_s * 1000)))}
        if self.config.token is not None:
            headers["authorization"] = f"Bearer {self.config.token}"
        return Send(
            method=call.method,
            url=self.config.url.rstrip("/") + call.path,
            content=call.body,
            params=call.params,
            headers=headers,
            timeout_s=left_s,
        )

    def _wait_s(self, error: Exception, attempt: int) -> float:
        backoff_s: float = self.random.random() * self.config.backoff_first_ms * 2**attempt / 1000
        if isinstance(error, AnswerRefusedError) and error.retry_after_s is not None:
            return error.retry_after_s + backoff_s
        return backoff_s


def _decoded(response: httpx.Response, kind: type[Answer]) -> Answer:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except UNREADABLE as error:
        raise AnswerRefusedError(
            f"what came back is no {getattr(kind, '__name__', kind)}: {error}",
            status=response.status_code,
            code="unreadable_answer",
        ) from error


def _is_retried(error: Exception) -> bool:
    return isinstance(error, WorkerUnreachableError) or (
        isinstance(error, AnswerRefusedError) and error.status in _RETRIED
    )


def _error_of(result: Result) -> Exception:
    if isinstance(result, httpx.TimeoutException):
        return ClientDeadlineError(f"no answer in time: {result!r}")
    if isinstance(result, httpx.TransportError):
        return WorkerUnreachableError(f"the worker cannot be reached: {result!r}")
    assert isinstance(result, httpx.Response), "a request was sent"
    try:
        body = msgspec.json.decode(result.content, type=ErrorAnswer)
    except UNREADABLE:
        # Something in between answered, a proxy for example.
        body = ErrorAnswer(request_id="", error=ErrorBody(code="http_error", message=result.text[:200]))
    retry_after = result.headers.get("retry-after", "")
    return AnswerRefusedError(
        body.error.message,
        status=result.status_code,
        code=body.error.code,
        field=body.error.field,
        request_id=body.request_id,
        retry_after_s=int(retry_after) if retry_after.isdecimal() else None,
    )
