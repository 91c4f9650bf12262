"""Bodies of requests and answers (JSON), shared by the API and by whoever calls it from Python."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec

from stream.events import IntId, TextId

TIMEOUT_HEADER: Final = "x-timeout-ms"
"""Header of a request: how long (ms) the caller waits for its answer."""

ItemId = IntId | TextId
"""Non-negative 64-bit integer, or text of 1 to 256 characters."""

Surface = Annotated[str, msgspec.Meta(max_length=256)] | int
"""As in the context of events, under `events.surface_key`."""

Category = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
"""As in the `items` topic."""


class RecommendRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/recommend`: the best items for a user."""

    user_id: IntId | TextId
    k: Annotated[int, msgspec.Meta(ge=1)] = 10
    exclude_seen: bool = True
    """Leave out what is in the user's history, as far as it is held in memory (`hot.max_len`)."""
    exclude: list[ItemId] = []
    categories: list[Category] = []
    """Only items that are in at least one of these; empty: of any or none."""
    exclude_categories: list[Category] = []
    """No items that are in any of these."""
    session: list[ItemId] = []
    """Items of the visit under way, oldest first: stand in for a history that is not there."""
    diversity: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """0: by score. Towards 1: items that differ from those before them (maximal marginal relevance)."""
    surface: Surface | None = None
    """Where the items will be shown, as `RankRequest.surface`: for the impression; the order does not depend on it."""


class RankRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/rank`: given candidates in order of preference."""

    user_id: IntId | TextId
    candidates: Annotated[list[ItemId], msgspec.Meta(min_length=1)]
    surface: Surface | None = None
    """Where they will be shown, one of `events.surfaces`; read with `ranking.surfaces` and `ranking.kind = "llatte"`.
    Another counts as not told, as in events."""


class ScoredItem(msgspec.Struct, frozen=True, kw_only=True):
    """One recommended item, with the id as its producers write it."""

    item_id: int | str
    score: float | None


class RankedItem(ScoredItem, frozen=True, kw_only=True):
    """One ranked candidate. Unknown candidates come last, without a score."""

    known: bool
    predictions: dict[str, float] | None = None
    """By the name of each task of `ranking.tasks`, its probability; null where the ranking head was not asked."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What every answer of `recommend` and `rank` says about what it was computed from."""

    request_id: str
    snapshot_version: int | None
    """Weights used; null before the first snapshot."""
    weights_event_time: str | None
    """Event-time watermark of those weights (RFC 3339)."""
    history_event_time: str | None
    """Newest interaction of the user that was used (RFC 3339); null when none was."""
    fallback: bool
    """True: ordered by decayed popularity, not by the model; `fallback_reason` says why."""
    fallback_reason: str | None


class Recommendation(Answer, frozen=True, kw_only=True):
    """Answer of `POST /v1/recommend`, best item first."""

    items: list[ScoredItem]
    from_session: bool
    """The user's state was computed from the request's `session`, since no history could be read."""


class RankedCandidates(Answer, frozen=True, kw_only=True):
    """Answer of `POST /v1/rank`, best candidate first."""

    items: list[RankedItem]
    ranked_by: Literal["head", "retrieval", "popularity"]
    """What gave the scores: the ranking head, the retrieval score, or, in a fallback, decayed popularity."""
    upstream_age: float | None = None
    """Seconds from the newest interaction that the user's vector from upstream knows to the request; null: no vector
    was read, because there is none or the ranker reads none."""


class RefusedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Why one event of a request is not acceptable."""

    index: int
    """Place in the list that was sent; 0 for a single event."""
    reason: str
    """Reason code of `stream.events.REASONS`."""
    field: str | None
    error: str


class EventsAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/events`: the log holds these events."""

    request_id: str
    event_ids: list[str]


class ForgetAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """`DELETE /v1/users/{user_id}`: the log holds the command."""

    request_id: str
    user_id: int | str


class AdminAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator asked for is done."""

    request_id: str
    version: int | None
    """The version it was about; null when there was none: nothing pinned, no candidate."""


class SnapshotsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /admin/snapshots`."""

    request_id: str
    snapshots: dict[str, Any]
    """As `headrace snapshots ls --json` prints it."""


class ShadowAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /admin/shadow`."""

    request_id: str
    shadow: dict[str, Any] | None
    """How far the candidate's answers are from those in service; null when nothing is compared."""


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong, for programs (`code`) and for people (`message`)."""

    code: str
    message: str
    field: str | None = None
    refused: list[RefusedEvent] | None = None


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Body of every answer that is not a success."""

    request_id: str
    error: ErrorBody


def rfc3339(time_ms: int | None) -> str | None:
    """`2024-05-01T12:00:00.123Z` for epoch milliseconds; None for None or a time that no calendar holds."""
    if time_ms is None:
        return None
    try:
        moment = datetime.fromtimestamp(time_ms / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return None
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_ms % 1000:03d}Z"
