"""What two runs must agree on: sha256 of histories, weights and metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from feature_store.store import FeatureStore

_OF_THE_EVENT: Final = ("event_time_ms", "event_key", "item_id", "action", "value", "surface")
"""Columns of a history that do not depend on when its interactions arrived."""
_WEIGHTS: Final = ("ids", "weight", "bias", "trend")
_USERS_AT_ONCE: Final = 10_000


def histories_fingerprint(store: FeatureStore, user_ids: NDArray[np.int64]) -> str:
    """Of the whole histories of some users, arrival columns aside."""
    found = hashlib.sha256()
    users = np.unique(user_ids)
    for start in range(0, len(users), _USERS_AT_ONCE):
        histories = store.read(users[start : start + _USERS_AT_ONCE], max_len=2**31 - 1)
        found.update(histories.user_ids.tobytes() + histories.offsets.tobytes())
        for name in _OF_THE_EVENT:
            found.update(getattr(histories, name).tobytes())
    return found.hexdigest()


def learner_fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of the `weights` and `metrics` in the tensors of a trainer's checkpoint."""
    weights = [name for name in tensors if name.startswith("dense.") or name in {f"items.{n}" for n in _WEIGHTS}]
    metrics = [name for name in tensors if name.startswith("metrics.")]
    return {"weights": _of(tensors, weights), "metrics": _of(tensors, metrics)}


def _of(tensors: Mapping[str, Tensor], names: list[str]) -> str:
    found = hashlib.sha256()
    for name in sorted(names):
        found.update(name.encode())
        found.update(tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()
