"""`headrace backtest at`: a moment of a run as a person reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backtest.run_files import RunFolder
from backtest.time_travel import Moment, look_back
from feature_store.ids import stable_id
from ops.errors import OpsError
from ops.readable import readable, utc_time
from stream.messages import id_as_written


def moment_of(run: Path, text: str, user: str, *, count: int, as_text: bool) -> Moment:
    """Raises OpsError for a time or an id that cannot be meant, RunFolderError for a folder that is no run."""
    try:
        moment = datetime.fromisoformat(text)
        user_id = id_as_written(user, as_text=as_text)
    except ValueError as error:
        raise OpsError(f"{error}: write a time as 2017-10-05T12:00, and an id of 1 to 256 characters") from error
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    number = user_id if isinstance(user_id, int) else stable_id(user_id)
    return look_back(RunFolder.open(run), round(moment.timestamp() * 1000), number, max_len=count)


def moment_lines(found: Moment, count: int) -> Iterator[str]:
    """For a terminal."""
    history, weights = found.history, found.weights
    yield f"{utc_time(found.moment_ms)}  user {found.user_id}, {history.num_interactions} interactions read"
    times, items = history.event_time_ms[-count:].tolist(), history.item_id[-count:].tolist()
    for time_ms, item in zip(times, items, strict=True):
        yield f"  {utc_time(time_ms)}  {_named(found, item)}"
    if weights is None or found.shown is None:
        yield "no weights had been kept yet (backtest.keep_weights_every)"
    else:
        yield (
            f"weights: version {weights.version} ({weights.kind}) of {utc_time(weights.created_at_ms)}, "
            f"{weights.lineage.num_interactions:,} interactions, event time up to {utc_time(weights.watermark_ms)}"
        )
        for place, (item, probability) in enumerate(_shown(found), start=1):
            yield f"  {place:2}  {probability:8.4f}  {_named(found, item)}"
    for one in found.published:
        yield f"{one['arm']}: publication {one['version']} of {utc_time(one['time_ms'])}"


def moment_to_json(found: Moment) -> str:
    """One JSON object."""
    weights = found.weights
    content: dict[str, Any] = {
        "moment_ms": found.moment_ms,
        "user_id": found.user_id,
        "history": [
            {"event_time_ms": time_ms, "item_id": item, "item": found.item_names.get(item), "arrival_ms": arrival_ms}
            for time_ms, item, arrival_ms in zip(
                found.history.event_time_ms.tolist(),
                found.history.item_id.tolist(),
                found.history.arrival_ms.tolist(),
                strict=True,
            )
        ],
        "weights": None
        if weights is None
        else {
            "version": weights.version,
            "created_at_ms": weights.created_at_ms,
            "watermark_ms": weights.watermark_ms,
            "num_interactions": weights.lineage.num_interactions,
        },
        "recommended": [
            {"item_id": item, "item": found.item_names.get(item), "probability": probability}
            for item, probability in _shown(found)
        ],
        "published": found.published,
    }
    return json.dumps(content)


def _shown(found: Moment) -> list[tuple[int, float]]:
    if found.shown is None:
        return []
    rows = zip(found.shown.item_ids_SK[0].tolist(), found.shown.probabilities_SK[0].tolist(), strict=True)
    return [(item, probability) for item, probability in rows if item >= 0]


def _named(found: Moment, item: int) -> str:
    return readable(found.item_names[item]) if item in found.item_names else str(item)
