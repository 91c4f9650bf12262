"""From histories to user states, computing only what the cache of keys and values does not hold.

Everything here runs in the model thread. What is kept of a user belongs to one set of weights, by identity: after a
swap, also one back to a version served before, nothing that was kept is used again. In place of the history's `seq`
stand the interactions themselves (model/user_state.py): arrival numbers start over when a user was forgotten.

Shapes: U users, L positions the model reads, D embedding width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import HistoryBatch
from model.user_state import KeptState, encode_users, keeps_user_states, user_inputs, window_len
from serving.config import ServingConfig
from serving.weights import ServedWeights, WeightsInfo

Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the model reads of one user, oldest first: at least one interaction."""

    user_id: int | None
    """None: nothing of it is kept, or what is read is no user's history."""
    rows: Int64s
    """int64[n], rows of the item table; -1: an item that the weights do not know."""
    times_ms: Int64s
    """int64[n], when each interaction happened."""
    acts: Int64s
    """int64[n], what was done, a bit each, and above them where (JaggedHistories.acts); 0 where that is not told."""
    values: NDArray[np.float32]
    """float32[n], NaN where there is none."""


class UserStateCache:
    """The states of the users asked for last, within a bound."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.num_bytes = 0
        self.num_hits = 0
        """Histories of which at least one position was not computed again."""
        self.num_misses = 0
        self.num_positions_reused = 0
        self.num_positions_computed = 0
        self._states: OrderedDict[int, tuple[WeightsInfo, KeptState]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def get(self, user_id: int, weights: WeightsInfo) -> KeptState | None:
        """What was kept of a user under these very weights."""
        held = self._states.get(user_id)
        return held[1] if held is not None and held[0] is weights else None

    def put(self, user_id: int, weights: WeightsInfo, state: KeptState) -> None:
        """Keep a state in place of the one before; the users not asked for longest make room."""
        self.forget([user_id])
        if state.num_bytes > self.bytes_max:
            return
        self._states[user_id] = weights, state
        self.num_bytes += state.num_bytes
        while self.num_bytes > self.bytes_max:
            _, (_, oldest) = self._states.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def forget(self, user_ids: Iterable[int]) -> None:
        """Drop what is kept of users."""
        for user_id in user_ids:
            held = self._states.pop(user_id, None)
            if held is not None:
                self.num_bytes -= held[1].num_bytes

    def status(self) -> dict[str, int]:
        """JSON-ready figures."""
        return {
            "users": len(self),
            "bytes": self.num_bytes,
            "hits": self.num_hits,
            "misses": self.num_misses,
            "positions_reused": self.num_positions_reused,
            "positions_computed": self.num_positions_computed,
        }


class UserEncoder:
    """States of users under the weights in service."""

    def __init__(self, config: ServingConfig, weights: ServedWeights) -> None:
        self._weights = weights
        self._is_keeping = config.user_state_bytes > 0 and keeps_user_states(weights.config)
        hop = max(1, int(weights.max_len * config.window_hop_share))
        self._hop = hop if self._is_keeping else 1
        self.cache = UserStateCache(config.user_state_bytes)

    def window_len(self, num_interactions: int) -> int:
        """How many of a user's newest interactions are read, of so many that have ever arrived."""
        return window_len(num_interactions, max_len=self._weights.max_len, hop=self._hop)

    def encode(self, readings: Sequence[Reading], now_ms: int) -> Tensor:
        """u_UD: the state of each when its user asks at `now_ms`. Weights must be loaded."""
        config = self._weights.config
        inputs = [user_inputs(config, one.rows, one.times_ms, now_ms, one.acts, one.values) for one in readings]
        if not self._is_keeping:
            batch = _history_batch(inputs)
            return self._weights.recommender.encode(batch)[batch.last_positions()]
        info, cache = self._weights.info, self.cache
        assert info is not None, "no weights are loaded"
        known = [None if one.user_id is None else cache.get(one.user_id, info) for one in readings]
        found = encode_users(self._weights.recommender, inputs, known)
        cache.num_positions_reused += sum(found.num_reused_B)
        cache.num_positions_computed += sum(found.num_computed_B)
        for reading, state, num_reused in zip(readings, found.states, found.num_reused_B, strict=True):
            if reading.user_id is not None:
                cache.num_hits += num_reused > 0
                cache.num_misses += num_reused == 0
                cache.put(reading.user_id, info, state)
        return found.u_BD


def _history_batch(inputs: Sequence[Int64s]) -> HistoryBatch:
    """`user_inputs` of several users as encoders without kept states read them."""
    joined_IL = torch.from_numpy(np.concatenate(inputs, axis=1))
    rows_L, times_ms_L, asked_ms_L, *acts = joined_IL
    return HistoryBatch(
        rows_L=rows_L,
        timestamps_ms_L=times_ms_L,
        query_times_ms_L=asked_ms_L,
        offsets=torch.from_numpy(np.cumsum([0, *(own.shape[1] for own in inputs)])),
        actions_L=acts[0] if acts else None,
        values_L=acts[1].int().view(torch.float32) if acts else None,
    )
