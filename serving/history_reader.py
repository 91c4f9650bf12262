"""Histories for a micro-batch, from memory or the store, and what to do when the store is away."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.errors import FeatureStoreError, HistoryBehindError, StoreUnavailableError
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions, JaggedHistories
from feature_store.reading import CurrentHistories
from feature_store.store import FeatureStore
from stream.clock import Clock

logger = logging.getLogger(__name__)

Int64s = NDArray[np.int64]

STORE_UNAVAILABLE: Final = "store_unavailable"
HISTORY_BEHIND: Final = "history_behind"
HISTORY_UNREADABLE: Final = "history_unreadable"

_PAUSE_S: Final = 1.0
"""After the store failed, how long no request waits for it again."""
_BEHIND_RETRIES: Final = 2
"""Answers have deadlines: a history that SQL does not hold yet is not waited for as long as a trainer would."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserHistory:
    """What is known of one user, oldest first."""

    user_id: int
    item_ids: Int64s
    event_time_ms: Int64s
    action: NDArray[np.uint32]
    """Bitmask of what the user did, of each interaction."""
    acts: Int64s
    """The same, and above the bits where it happened (JaggedHistories.acts)."""
    value: NDArray[np.float32]
    """Of each interaction, NaN where there is none."""
    num_arrived: int = 0
    """Interactions of this user that have ever been accepted, as far as those at hand tell."""
    missing_because: str | None = None
    """Why nothing could be read; None also for a user without history."""

    @property
    def newest_ms(self) -> int | None:
        """Event time of the newest interaction."""
        return int(self.event_time_ms[-1]) if len(self.event_time_ms) else None


class GuardedStore(FeatureStore):
    """The store as the model thread reads it: after a failure it fails at once for a while, since a read that waits
    for a connection holds up everybody's answers. Has connections of its own, so that nothing else holds them.
    """

    def __init__(self, config: FeatureStoreConfig, clock: Clock) -> None:
        super().__init__(config)
        self._clock = clock
        self._away_until_s = -1.0

    def read(
        self,
        user_ids: Int64s,
        *,
        max_len: int,
        before_ms: Int64s | int | None = None,
        known_at_ms: NDArray[np.int64] | int | None = None,
        below_seq: NDArray[np.integer[Any]] | int | None = None,
        watermark_ms: int | None = None,
    ) -> JaggedHistories:
        """See FeatureStore.read."""
        with self._guarded():
            return super().read(
                user_ids,
                max_len=max_len,
                before_ms=before_ms,
                known_at_ms=known_at_ms,
                below_seq=below_seq,
                watermark_ms=watermark_ms,
            )

    def read_current(
        self,
        user_ids: Int64s,
        *,
        max_len: int,
        before_ms: Int64s | int | None = None,
        below_seq: NDArray[np.integer[Any]] | int | None = None,
        watermark_ms: int | None = None,
    ) -> CurrentHistories:
        """See FeatureStore.read_current."""
        with self._guarded():
            return super().read_current(
                user_ids, max_len=max_len, before_ms=before_ms, below_seq=below_seq, watermark_ms=watermark_ms
            )

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        if self._clock.monotonic_s() < self._away_until_s:
            raise StoreUnavailableError("the feature store did not answer a moment ago")
        try:
            yield
        except StoreUnavailableError:
            self._away_until_s = self._clock.monotonic_s() + _PAUSE_S
            raise


class HistoryReader:
    """The hot histories of this worker, used by the model thread only."""

    def __init__(self, store_config: FeatureStoreConfig, config: HotHistoriesConfig, clock: Clock) -> None:
        self._store = GuardedStore(store_config, clock)
        self._config = replace(config, behind_num_retries=min(config.behind_num_retries, _BEHIND_RETRIES))
        self._hot = HotHistories(self._store, self._config)

    @property
    def hot(self) -> HotHistories:
        """The hot histories, for figures."""
        return self._hot

    def close(self) -> None:
        """Close the connections to the store."""
        self._store.close()

    def read(self, user_ids: Sequence[int]) -> dict[int, UserHistory]:
        """The history of every user, at most `hot.max_len` interactions; never raises for an absent store."""
        return self._read_together(np.unique(np.array(user_ids, np.int64)))

    def _read_together(self, user_ids: Int64s) -> dict[int, UserHistory]:
        try:
            return _by_user(self._hot.gather(user_ids, max_len=self._config.max_len))
        except FeatureStoreError as error:
            if len(user_ids) > 1:
                # One user whose history cannot be read must not take the others' answers along.
                return {k: v for one in user_ids for k, v in self._read_together(np.array([one])).items()}
            return {int(user_ids[0]): _missing(int(user_ids[0]), error)}

    def apply(self, interactions: Interactions, *, watermark_ms: int) -> None:
        """Take in new interactions. If the store is needed and away, those users are read again when asked for.

        `watermark_ms`: the highest event time announced, which decides what has become too old.
        """
        try:
            self._hot.apply(interactions, watermark_ms=watermark_ms)
        except FeatureStoreError as error:
            logger.debug("an update could not be completed from the store: %s", error)
            self._hot.forget(np.unique(interactions.user_id))

    def forget(self, user_ids: Int64s) -> None:
        """Drop users whose histories were removed."""
        self._hot.forget(user_ids)

    def clear(self) -> None:
        """Drop everything: updates may have been missed, the store knows better."""
        self._hot = HotHistories(self._store, self._config)


def _missing(user_id: int, error: FeatureStoreError) -> UserHistory:
    if isinstance(error, StoreUnavailableError):
        reason = STORE_UNAVAILABLE
    elif isinstance(error, HistoryBehindError):
        reason = HISTORY_BEHIND
    else:
        reason = HISTORY_UNREADABLE
        logger.error("the history of user %d cannot be read: %s", user_id, error)
    empty = np.empty(0, np.int64)
    return UserHistory(
        user_id=user_id,
        item_ids=empty,
        event_time_ms=empty,
        action=empty.astype(np.uint32),
        acts=empty,
        value=empty.astype(np.float32),
        missing_because=reason,
    )


def _by_user(histories: JaggedHistories) -> dict[int, UserHistory]:
    bounds, acts = histories.offsets.tolist(), histories.acts
    return {
        user_id: UserHistory(
            user_id=user_id,
            item_ids=histories.item_id[start:end],
            event_time_ms=histories.event_time_ms[start:end],
            action=histories.action[start:end],
            acts=acts[start:end],
            value=histories.value[start:end],
            num_arrived=int(histories.seq[start:end].max()) + 1 if end > start else 0,
        )
        for user_id, start, end in zip(histories.user_ids.tolist(), bounds[:-1], bounds[1:], strict=True)
    }
