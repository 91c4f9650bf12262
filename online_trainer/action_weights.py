"""How much an interaction counts as something to predict, by what the user did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class ActionWeights:
    """Weights by action name, for interactions as they are stored: bit n is the n-th of `actions`."""

    def __init__(self, weights: Mapping[str, float], actions: Sequence[str]) -> None:
        unknown = sorted(weights.keys() - set(actions))
        if unknown:
            raise ValueError(
                f"loss.action_weights names {', '.join(unknown)}; declared in events.actions are {', '.join(actions)}"
            )
        self.is_uniform = not weights
        """No action is named: all interactions count the same."""
        self._weight_of_bit = [weights.get(action, 1.0) for action in actions]

    def of(self, action: NDArray[np.uint32]) -> NDArray[np.float32]:
        """float32[N]: the largest weight among the actions of each interaction."""
        found = np.zeros(len(action), np.float32)
        for bit, weight in enumerate(self._weight_of_bit):
            has_action = (action >> np.uint32(bit)) & np.uint32(1) == 1
            np.maximum(found, np.where(has_action, np.float32(weight), np.float32(0)), out=found)
        return found
