"""Whether the stream outruns the trainer, and what that cost: in the log, in `/status` and as instruments."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from online_trainer.batching import MicroBatch, MicroBatcher
from online_trainer.config import TrainerConfig
from online_trainer.ledger import Ledger
from stream.clock import Clock

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lag:
    """How far behind the trainer was when it last looked."""

    pending: int = 0
    """Interactions read and not yet taken; what is still in the log is not among them."""
    oldest_ms: int = 0
    """For how long (ms) the first of them has been in the log."""
    is_behind: bool = False
    """More are pending than `trainer.lag_interactions`."""


class LagWatch:
    """Looks at what waits between two steps; `newest` may be read from any thread."""

    def __init__(self, batcher: MicroBatcher, config: TrainerConfig, clock: Clock, meter: Meter) -> None:
        self._batcher, self._config, self._clock = batcher, config, clock
        self._num_thinned_since = 0
        self.newest = Lag()
        self._thinned = meter.create_counter("headrace.trainer.thinned", unit="{interaction}")
        self._large = meter.create_counter("headrace.trainer.large_steps", unit="{step}")

        def pending(_options: CallbackOptions) -> Iterator[Observation]:
            yield Observation(self.newest.pending)

        def oldest(_options: CallbackOptions) -> Iterator[Observation]:
            yield Observation(self.newest.oldest_ms / 1000)

        meter.create_observable_gauge("headrace.trainer.pending", [pending], unit="{interaction}")
        meter.create_observable_gauge("headrace.trainer.lag", [oldest], unit="s")

    def look(self) -> None:
        """Note what waits now; say so when that begins or ends to be too much."""
        oldest_ms = self._batcher.oldest_append_ms()
        lag = Lag(
            pending=self._batcher.num_pending,
            oldest_ms=0 if oldest_ms is None else max(0, self._clock.now_ms() - oldest_ms),
            # Thinning ends every stretch at once: it counts as one until all that was read is learned from.
            is_behind=self._batcher.is_behind() or (self.newest.is_behind and self._batcher.is_full()),
        )
        if lag.is_behind and not self.newest.is_behind:
            logger.warning(
                "the stream outruns the trainer: %d interactions wait, the first for %.1f s (trainer.lag_policy = %s)",
                lag.pending, lag.oldest_ms / 1000, self._config.lag_policy,
            )  # fmt: skip
            self._num_thinned_since = 0
        elif self.newest.is_behind and not lag.is_behind:
            logger.warning("the trainer has caught up; %d interactions were passed over", self._num_thinned_since)
        self.newest = lag

    def took(self, batch: MicroBatch) -> None:
        """Count what a finished step passed over, and whether it was a large one."""
        if len(batch.thinned):
            self._num_thinned_since += len(batch.thinned)
            self._thinned.add(len(batch.thinned))
        if batch.is_large:
            self._large.add(1)

    def status(self, ledger: Ledger) -> dict[str, object]:
        """JSON-ready; what was thinned is counted over the model's whole life."""
        return {
            "policy": self._config.lag_policy,
            "is_behind": self.newest.is_behind,
            "oldest_ms": self.newest.oldest_ms,
            "thinned": ledger.num_thinned,
            "large_steps": ledger.num_large_steps,
        }
