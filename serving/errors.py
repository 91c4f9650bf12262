"""What can go wrong in `serving`.

ServingError
├── RequestError               refused on behalf of the caller: HTTP status, code, Retry-After
│   ├── InvalidRequestError      422, or 413 for a body that is too large: sending it again will not help
│   ├── EventsRefusedError       422: some of the events are not acceptable, none was sent
│   ├── UnauthenticatedError     401: no token, or none that is known
│   ├── ForbiddenError           403: the token does not allow this
│   ├── RateLimitedError         429: this caller asks too often
│   ├── QueueFullError           429: more requests wait than can be answered in time
│   ├── DeadlineExceededError    504: accepted, but not answered before its deadline
│   ├── DrainingError            503: this worker is stopping
│   ├── AdminRefusedError        404, 409, 503: an operator asked for what cannot be done to the snapshots
│   ├── CategoriesUnavailableError  503: which items are in which category is not known yet
│   └── LogAwayError             503: the log did not acknowledge what was to be sent
│       └── EventsUnavailableError
├── SnapshotRefusedError       a published snapshot cannot be applied on top of what is loaded
├── ClientError                what a caller of `serving.client` gets
│   ├── AnswerRefusedError       a worker answered with an error: status, code, field, request id
│   ├── WorkerUnreachableError   no connection, or it broke
│   └── ClientDeadlineError      the call's own time was up
├── PortTakenError             another process listens on the port
└── ListenRefusedError         the worker would listen where it must not as it is set up, or with a useless certificate
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.messages import RefusedEvent


class ServingError(Exception):
    """Root of this room's errors."""


class RequestError(ServingError):
    """A request that gets an error answer. Subclasses say which HTTP status and code."""

    status = 500
    code = "error"
    retry_after_s: int | None = None

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidRequestError(RequestError):
    """The request's content is not acceptable."""

    status = 422
    code = "invalid_request"

    def __init__(self, message: str, *, field: str | None = None, status: int = 422, code: str = code) -> None:
        super().__init__(message, field=field)
        self.status = status
        self.code = code


class EventsRefusedError(RequestError):
    """At least one event is not acceptable; nothing of the request was sent."""

    status = 422
    code = "events_refused"

    def __init__(self, message: str, refused: Sequence[RefusedEvent]) -> None:
        super().__init__(message)
        self.refused = list(refused)


class UnauthenticatedError(RequestError):
    """Nobody knows who asks."""

    status = 401
    code = "unauthenticated"


class ForbiddenError(RequestError):
    """The caller is known, and may not do this."""

    status = 403
    code = "forbidden"


class RateLimitedError(RequestError):
    """This caller has used up what it may ask for."""

    status = 429
    code = "rate_limited"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(RequestError):
    """More wait for the model than can be answered in time."""

    status = 429
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(RequestError):
    """No answer in time. 504 and not 503: the request was accepted, and what it waited for was too slow."""

    status = 504
    code = "deadline_exceeded"


class DrainingError(RequestError):
    """This worker is stopping; another one takes the request."""

    status = 503
    code = "draining"
    retry_after_s = 1


class AdminRefusedError(RequestError):
    """What an operator asked for cannot be done, and nothing was changed."""

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class CategoriesUnavailableError(RequestError):
    """A filter by category cannot be honoured; answering without it would show what was asked to be left out."""

    status = 503
    code = "categories_unavailable"
    retry_after_s = 1


class LogAwayError(RequestError):
    """The log is away, so nothing can be accepted durably."""

    status = 503
    code = "log_unavailable"
    retry_after_s = 1


class EventsUnavailableError(LogAwayError):
    """Events could not be sent."""


class SnapshotRefusedError(ServingError):
    """The snapshot's files are whole, but do not fit what this worker holds or is configured for."""


class PortTakenError(ServingError):
    """The address to listen on cannot be bound."""


class ListenRefusedError(ServingError):
    """The worker must not listen as it is set up."""


class ClientError(ServingError):
    """A call of a worker did not succeed, retries included."""


class AnswerRefusedError(ClientError):
    """A worker, or something in front of it, answered with an error."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        field: str | None = None,
        request_id: str = "",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code, self.field = status, code, field
        self.request_id, self.retry_after_s = request_id, retry_after_s


class WorkerUnreachableError(ClientError):
    """No connection to the worker, or it broke before an answer came."""


class ClientDeadlineError(ClientError):
    """The time that the caller had for the call was up."""
