"""From users to vectors: read whole histories, compute in parts that fit, leave out what is no finite number.

Shapes: U users, W numbers of a vector.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from feature_store.errors import HistoryBehindError
from feature_store.interactions import JaggedHistories
from feature_store.reading import CurrentHistories
from feature_store.store import FeatureStore
from feature_store.user_states import NewVectors
from model.upstream_model import UpstreamModel, UserBatch

logger = logging.getLogger(__name__)

Int64s = NDArray[np.int64]
_LOOKS: Final = 100
_PAUSE_S: Final = 0.05
_NAMED_MAX: Final = 10
"""Users named in one line of the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputedVectors:
    """What one version says of users with a history."""

    vectors: NewVectors
    refused: Int64s
    """Users whose vector was not finite: they keep the one that they have."""


def histories_of(
    store: FeatureStore,
    user_ids: Int64s,
    below_seq: Int64s,
    *,
    max_len: int,
    pause: Callable[[float], None] = time.sleep,
) -> CurrentHistories:
    """Newest interactions of users as the store has them now, which must be all with smaller arrival numbers.

    Updates are announced just before they are committed, so SQL may be a moment behind; it is waited for. A user of
    whom it holds nothing was forgotten. Raises HistoryBehindError or StoreUnavailableError.
    """
    for looks_left in reversed(range(_LOOKS)):
        current = store.read_current(user_ids, max_len=max_len)
        is_behind = (current.next_seq < below_seq) & (current.next_seq > 0)
        is_missing = (current.next_seq == 0) & (below_seq > 0)
        if not (is_behind.any() or (is_missing.any() and looks_left > _LOOKS // 2)):
            return current
        pause(_PAUSE_S)
    raise HistoryBehindError(
        f"SQL does not hold interactions that were announced of {int(is_behind.sum())} users: check that ingest runs "
        "on the same database",
        user_ids[is_behind],
    )


def compute(model: UpstreamModel, version: int, current: CurrentHistories, *, max_tokens: int) -> ComputedVectors:
    """The vector of every user with a history, as of its newest interaction."""
    histories = current.histories
    rows = np.flatnonzero(histories.lengths() > 0)
    as_of_ms = histories.event_time_ms[histories.offsets[1:][rows] - 1]
    parts = [
        model.user_vectors(_user_batch(model, histories, rows[part], as_of_ms[part])).numpy()
        for part in parts_within(histories.lengths()[rows], max_tokens)
    ]
    vector = np.concatenate(parts) if parts else np.empty((0, model.config.upstream.width), np.float32)
    is_sound = np.isfinite(vector).all(1)
    refused = histories.user_ids[rows[~is_sound]]
    if len(refused):
        named = ", ".join(map(str, refused[:_NAMED_MAX].tolist()))
        logger.error(
            "upstream version %d gave %d users a vector that is not finite; they keep the one before: %s%s",
            version,
            len(refused),
            named,
            " …" if len(refused) > _NAMED_MAX else "",
        )
    return ComputedVectors(
        vectors=NewVectors(
            user_id=histories.user_ids[rows[is_sound]],
            next_seq=current.next_seq[rows[is_sound]],
            as_of_ms=as_of_ms[is_sound],
            vector=vector[is_sound],
        ),
        refused=refused,
    )


def compute_all(
    models: Mapping[int, UpstreamModel], current: CurrentHistories, *, max_tokens: int
) -> dict[int, ComputedVectors]:
    """Version → its vectors of the same users."""
    return {version: compute(model, version, current, max_tokens=max_tokens) for version, model in models.items()}


def parts_within(lengths: Int64s, max_tokens: int) -> Iterator[slice]:
    """Slices of users with at most max_tokens interactions together; a user with more is alone."""
    start, tokens = 0, 0
    for place, length in enumerate(lengths.tolist()):
        if place > start and tokens + length > max_tokens:
            yield slice(start, place)
            start, tokens = place, 0
        tokens += length
    if len(lengths) > start:
        yield slice(start, len(lengths))


def _user_batch(model: UpstreamModel, histories: JaggedHistories, rows: Int64s, as_of_ms: Int64s) -> UserBatch:
    starts, ends = histories.offsets[:-1][rows], histories.offsets[1:][rows]
    places = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    return UserBatch(
        rows_L=torch.from_numpy(model.items.lookup(histories.item_id[places])),
        actions_L=torch.from_numpy(histories.acts[places]),
        values_L=torch.from_numpy(histories.value[places]),
        timestamps_ms_L=torch.from_numpy(histories.event_time_ms[places]),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(ends - starts)])),
        as_of_ms_B=torch.from_numpy(as_of_ms),
    )
