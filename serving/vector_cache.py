"""Users' vectors in memory: read with a user's first request, kept up off the answers' path, all of one version.

What a worker holds is of one version at any moment, and changes to the next one at once: every vector held is read of
the new version first. So no two answers of a worker mix versions back and forth, and no micro-batch mixes them at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_store.config import UserVectorsConfig
from feature_store.errors import FeatureStoreError
from feature_store.forgotten import ForgottenUsers
from feature_store.store import FeatureStore
from feature_store.user_states import UserVectors, version_in_effect
from serving.batcher import ModelThread
from serving.user_vectors import UserVector
from stream.clock import Clock

logger = logging.getLogger(__name__)

Int64s = NDArray[np.int64]

_PAUSE_S: Final = 1.0
"""After the store failed, how long no request waits for it again."""
_OVERLAP_MS: Final = 10_000
"""Vectors are stamped just before they are committed: what was committed late is looked for again for so long."""
_USERS_PER_READ: Final = 2_000
_NAMED_MAX: Final = 10


class UserVectorCache:
    """A VectorReader. `read` and `forget` belong to the model thread; `run` brings what is new to it."""

    def __init__(
        self,
        store: FeatureStore,
        config: UserVectorsConfig,
        model_thread: ModelThread,
        clock: Clock,
        *,
        model: str,
        width: int,
    ) -> None:
        """model, width: of the model that is served, and of its users' vectors."""
        self._model, self._width, self._config, self._clock = model, width, config, clock
        # Connections of its own, so that nothing else holds the model thread's.
        self._store, self._own_store = store, FeatureStore(store.config)
        self._model_thread = model_thread
        self._held: OrderedDict[int, UserVector | None] = OrderedDict()
        """By user, the longest unused first; None: there is none."""
        self._forgotten = ForgottenUsers()
        self._away_until_s = -1.0
        self._looked_up_to_ms: int | None = None
        """Stamp of the newest vector seen."""
        self._read_already: set[tuple[int, int]] = set()
        """(stamp, user) of vectors within the overlap that are in memory: looked for again, and not read again."""
        self.version: int | None = None
        """Of the upstream model, whose vectors are held."""
        self.num_hits = self.num_misses = self.num_damaged = 0
        self.problem: str | None = None
        """Why vectors are not kept up at the moment."""

    def close(self) -> None:
        """Close the connections to the store."""
        self._own_store.close()

    def read(self, user_ids: Sequence[int]) -> Mapping[int, UserVector]:
        """See VectorReader."""
        wanted = set(user_ids)
        unknown = np.array(sorted(wanted - self._held.keys()), np.int64)
        self.num_hits += len(wanted) - len(unknown)
        self.num_misses += len(unknown)
        if len(unknown) and (found := self._read_now(unknown)) is not None:
            version = _version_of(found)
            if version is not None and self.version is not None and version > self.version:
                # The next version took effect before `run` saw it: this batch, and all that follow, are of it.
                self._held.clear()
                found = self._read_now(np.array(sorted(wanted), np.int64)) or found
            self._take(found)
        answered = {}
        for user_id in wanted:
            if user_id in self._held:
                self._held.move_to_end(user_id)
                if (one := self._held[user_id]) is not None:
                    answered[user_id] = one
        while len(self._held) > self._config.cached_users:
            self._held.popitem(last=False)
        return answered

    def forget(self, user_ids: Int64s) -> None:
        """Drop users whose vectors were removed."""
        self._forgotten.add(user_ids)
        for user_id in user_ids.tolist():
            self._held.pop(user_id, None)

    def clear(self) -> None:
        """Drop everything: a forgotten user may have been missed."""
        self._held.clear()

    async def run(self) -> None:
        """Look for what is new every `user_vectors.refresh_ms`, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._config.refresh_ms / 1000)

    async def look(self) -> None:
        """Look once."""
        held, moment = await self._model_thread.run(lambda: (np.fromiter(self._held, np.int64), self._forgotten.moment))
        try:
            version = await asyncio.to_thread(self._version_now)
            is_next = version != self.version or (version is not None and self._looked_up_to_ms is None)
            up_to_ms = self._looked_up_to_ms
            if is_next:
                # Before what is held is read anew, so that nothing written meanwhile is missed.
                self._read_already.clear()
                up_to_ms = await asyncio.to_thread(self._store.user_states.newest_written_ms)
            written, up_to_ms = await asyncio.to_thread(self._written, version, held, up_to_ms)
            changed = held if is_next else np.array(sorted({user_id for _, user_id in written}), np.int64)
            parts = [
                await asyncio.to_thread(self._newest, self._store, changed[start : start + _USERS_PER_READ])
                for start in range(0, len(changed), _USERS_PER_READ)
            ]
        except FeatureStoreError as error:
            if self.problem is None:
                logger.warning("answers go on with the vectors in memory: %s", error)
            self.problem = str(error)
            return
        self.problem = None
        if is_next or parts:
            await self._model_thread.run(lambda: self._exchange(version, is_next, parts, moment))
        # Only now: what could not be read is read with the next look.
        self._looked_up_to_ms = up_to_ms
        since_ms = (up_to_ms or 0) - _OVERLAP_MS
        self._read_already = {one for one in self._read_already | written if one[0] >= since_ms}

    def _version_now(self) -> int | None:
        return version_in_effect(self._store.user_states.versions(self._model))

    def _written(
        self, version: int | None, held: Int64s, up_to_ms: int | None
    ) -> tuple[set[tuple[int, int]], int | None]:
        """(stamp, user) of vectors written since a stamp and not read yet, of users held; and the newest of all."""
        if version is None or up_to_ms is None:
            return set(), up_to_ms
        since_ms = up_to_ms - _OVERLAP_MS
        # Of users who are not held yet nothing is remembered: a request may read one just before it is written.
        found, wanted = set[tuple[int, int]](), set(held.tolist())
        after, limit = (-1, -1), 10_000
        while True:
            written = self._store.user_states.written_since(
                self._model, version, since_ms=since_ms, after=after, limit=limit
            )
            found.update(one for one in written if one[1] in wanted)
            if written:
                after = written[-1]
                up_to_ms = max(up_to_ms, after[0])
            if len(written) < limit:
                break
        return found - self._read_already, up_to_ms

    def _exchange(self, version: int | None, is_next: bool, parts: list[UserVectors], moment: int) -> None:
        """Put what was read in place, but for users forgotten since `moment`; in the model thread."""
        if self.version is not None and (version is None or version < self.version):
            return  # requests were ahead of this look
        if is_next:
            self._held.clear()
            self.version = version
        for found in parts:
            if _version_of(found) in (None, version):
                self._take(found, moment=moment)

    def _take(self, found: UserVectors, *, moment: int | None = None) -> None:
        if (version := _version_of(found)) is not None:
            self.version = version
        is_forgotten = self._forgotten.since(found.user_id, self._forgotten.moment if moment is None else moment)
        for row, user_id in enumerate(found.user_id.tolist()):
            if not is_forgotten[row]:
                is_there = found.version[row] >= 0
                self._held[user_id] = UserVector(found.vector[row], int(found.as_of_ms[row])) if is_there else None
        if len(found.damaged):
            self.num_damaged += len(found.damaged)
            logger.error("vectors of users %s are damaged and count as missing", found.damaged[:_NAMED_MAX].tolist())

    def _read_now(self, user_ids: Int64s) -> UserVectors | None:
        """From the store, on the way of an answer; None where it is away, and for a while after it was."""
        if self._clock.monotonic_s() < self._away_until_s:
            return None
        try:
            return self._newest(self._own_store, user_ids)
        except FeatureStoreError as error:
            self._away_until_s = self._clock.monotonic_s() + _PAUSE_S
            logger.debug("vectors could not be read: %s", error)
            return None

    def _newest(self, store: FeatureStore, user_ids: Int64s) -> UserVectors:
        return store.user_states.newest(self._model, user_ids, width=self._width)

    def status(self) -> dict[str, object]:
        """Figures, JSON-ready."""
        return {
            "version": self.version,
            "users": len(self._held),
            "hits": self.num_hits,
            "misses": self.num_misses,
            "damaged": self.num_damaged,
            "problem": self.problem,
        }


def _version_of(found: UserVectors) -> int | None:
    """One read is one state of the store, and so of one version; None where nobody has a vector."""
    newest = int(found.version.max(initial=-1))
    return newest if newest >= 0 else None
