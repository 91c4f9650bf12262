"""Reading and pruning the cached vectors of users; they are written through `StoreTransaction.user_states`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, func, select

from feature_store import user_states
from feature_store.engine import reading as read_transaction
from feature_store.engine import writing as write_transaction
from feature_store.publications import load_watermark
from feature_store.removing import count_forgotten
from feature_store.retention import Retention
from feature_store.tables import history_chunk, user_state
from feature_store.user_states import StatePruning, StateQuery, StoredVectors, UpstreamVersion, UserVectors


class UserStateStore:
    """The user states of one store; every call is a transaction of its own. Raises StoreUnavailableError."""

    def __init__(self, engine: Engine, retention: Retention) -> None:
        self._engine, self._retention = engine, retention

    def vectors(self, model: str, query: StateQuery, *, width: int) -> UserVectors:
        """Vectors of users as they were at each query's moment, of the version that was in effect then.

        Never made of what happened at or after `before_ms`, nor of arrivals from `below_seq` on; written strictly
        before `known_before_ms`. A vector whose writer's transaction was under way at that moment counts, though no
        reader could see it for some milliseconds more.

        Args:
            model: name of the model that is served.
            query: R moments.
            width: W; vectors of another width are damaged ones.
        """
        with read_transaction(self._engine) as connection:
            return user_states.load_vectors(connection, model, query, width)

    def newest(self, model: str, user_ids: NDArray[np.int64], *, width: int) -> UserVectors:
        """The newest vectors of users, of the version in effect: what an answer is computed from."""
        no_limit = np.full(len(user_ids), user_states.ANY)
        query = StateQuery(user_id=user_ids, before_ms=no_limit, known_before_ms=no_limit, below_seq=no_limit)
        return self.vectors(model, query, width=width)

    def stored(self, model: str, *, width: int) -> StoredVectors:
        """Every vector that is kept of a model, of all versions, in memory: for whoever sets them aside whole.

        Damaged ones are left out.
        """
        with read_transaction(self._engine) as connection:
            return user_states.load_stored(connection, model, width)

    def versions(self, model: str) -> list[UpstreamVersion]:
        """Versions of the upstream model that vectors are, were lately or will be served of; ascending."""
        with read_transaction(self._engine) as connection:
            return user_states.load_versions(connection, model)

    def written_since(
        self, model: str, version: int, *, since_ms: int, after: tuple[int, int] = (-1, -1), limit: int = 10_000
    ) -> list[tuple[int, int]]:
        """(written_at_ms, user id) of vectors written at or after a time, in order, at most `limit` behind `after`."""
        with read_transaction(self._engine) as connection:
            return user_states.load_written_since(connection, model, version, since_ms, after, limit)

    def newest_written_ms(self) -> int:
        """When (epoch ms) the newest vector of all was written; 0 before the first."""
        query = select(func.coalesce(func.max(user_state.c.written_at_ms), 0))
        with read_transaction(self._engine) as connection:
            return int(connection.execute(query).scalar_one())

    def newest_seq(self, model: str, version: int, user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """i64[U], `next_seq` of each user's newest vector of a version; -1 where there is none."""
        with read_transaction(self._engine) as connection:
            return user_states.load_newest_seq(connection, model, version, user_ids)

    def users_after(self, user_id: int, *, limit: int, active_since_ms: int = 0) -> NDArray[np.int64]:
        """i64[≤ limit], the next users by id, above `user_id`, with an interaction at or after a time (event time)."""
        chunk = history_chunk.c
        query = select(chunk.user_id).where(chunk.user_id > user_id).group_by(chunk.user_id)
        query = query.having(func.max(chunk.last_ms) >= active_since_ms).order_by(chunk.user_id).limit(limit)
        with read_transaction(self._engine) as connection:
            return np.array(connection.execute(query).scalars().all(), np.int64)

    def num_forgotten(self) -> int:
        """Interactions forgotten since ever; compare with `StoreTransaction.num_forgotten` before writing."""
        with read_transaction(self._engine) as connection:
            return count_forgotten(connection)

    def watermark_ms(self) -> int:
        """The highest event time applied; 0 before the first."""
        with read_transaction(self._engine) as connection:
            return load_watermark(connection)

    def prune(
        self, model: str, *, keep_ms: int, states_max: int, now_ms: int, after_user: int = -1, max_users: int = 200
    ) -> tuple[int, int | None]:
        """Remove vectors that were superseded over `keep_ms` ago (processing time), of the next users only.

        The newest vector of a user stays, whatever its age, while retention keeps anything of what it was made of.

        Returns:
            How many were removed, and the user to go on after; None: those were the last.
        """
        with write_transaction(self._engine) as connection:
            expired_ms = self._retention.removal_ms(load_watermark(connection))
            pruning = StatePruning(before_ms=now_ms - keep_ms, states_max=states_max, expired_ms=expired_ms)
            return user_states.prune(connection, model, pruning, after_user=after_user, max_users=max_users)
