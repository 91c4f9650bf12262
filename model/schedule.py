"""Learning rates over a stream that does not end: what a step's rates are multiplied by."""

from __future__ import annotations

import math

from model.config import OptimizerConfig


def learning_rate_factor(config: OptimizerConfig, step: int) -> float:
    """Factor of step 1, 2, …: rises linearly over warm_up_steps, then stays at 1, or falls to the floor and no lower.

    A rate that falls to nothing would end learning; on a stream, the floor is what follows it for good.
    """
    if step < config.warm_up_steps:
        return step / config.warm_up_steps
    if config.schedule == "constant":
        return 1.0
    return max(config.schedule_floor, math.sqrt(max(config.warm_up_steps, 1) / step))
