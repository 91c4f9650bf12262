"""Batches that are not learned from because their loss says they would do harm, kept for somebody to look at.

`<root>/s0000000042.parquet` holds the interactions of step 42, `s0000000042.json` why they were set aside;
`r0000000042` those of the ranking head's step 42, which it counts by itself.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from feature_store.interactions import Interactions
from model.small_records import read_record
from stream.failpoints import fail_point

logger = logging.getLogger(__name__)

TYPICAL_STEPS: Final = 200
"""Losses of steps learned from that a new one is compared with …"""
TYPICAL_STEPS_MIN: Final = 50
"""… and how many there must be."""
_DEVIATIONS_PER_MAD: Final = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""
RANKING: Final = "ranking_"
_FILE: Final = re.compile(r"[sr]\d{10}\.json")
_UNFINISHED: Final = ".tmp"


@dataclass(frozen=True, kw_only=True, slots=True)
class SetAside:
    """Why one step's batch was set aside."""

    step: int
    """Of the trainer; where it `is_of_ranking`, of the ranking head."""
    reason: str
    """`loss` or `gradient` where that is not a finite number, `spike` where the loss is far above what is typical;
    `ranking_loss` and so on where it is the ranking head's."""
    loss: float | None
    """None where it is not finite."""
    typical_loss: float | None
    """Median of the steps before; None of too few."""
    num_interactions: int
    watermark_ms: int

    @property
    def is_of_ranking(self) -> bool:
        """Whether the ranking head did not learn from it; the rest of the model did, if it concerned it."""
        return self.reason.startswith(RANKING)

    @property
    def name(self) -> str:
        """Of its files, without suffix."""
        return f"{'r' if self.is_of_ranking else 's'}{self.step:010d}"


class LossGuard:
    """Tells a batch that would do harm from a stream that has changed.

    A spike is a loss further above the median of the last TYPICAL_STEPS steps than `spike_deviations` standard
    deviations, estimated from the median absolute deviation: of the steps' losses, or where that is more, of what the
    mean of so few interactions may be. On a quiet stream a step has one or two, whose loss says little, beside the
    hundreds of a busy hour. After `max_in_a_row` spikes the stream itself must have changed: the guard forgets what was
    typical, and the batch is learned from.
    """

    def __init__(self, *, spike_deviations: float, max_in_a_row: int) -> None:
        self._spike_deviations, self._max_in_a_row = spike_deviations, max_in_a_row
        self._losses: deque[float] = deque(maxlen=TYPICAL_STEPS)
        self._sizes: deque[int] = deque(maxlen=TYPICAL_STEPS)
        self._num_in_a_row = 0

    @property
    def typical_loss(self) -> float | None:
        """Median loss of the steps before; None of too few."""
        return float(np.median(self._losses)) if len(self._losses) >= TYPICAL_STEPS_MIN else None

    def objection(self, loss: float, num_targets: int) -> str | None:
        """Why not to learn from a batch with this mean loss of so many targets (`loss`, `spike`); None: learn."""
        if not math.isfinite(loss):
            return "loss"
        typical = self.typical_loss
        if typical is not None and self._is_spike(loss, typical, num_targets):
            self._num_in_a_row += 1
            if self._num_in_a_row <= self._max_in_a_row:
                return "spike"
            logger.warning("%d losses in a row far above %.3f: the stream has changed", self._num_in_a_row, typical)
            self._losses.clear()
            self._sizes.clear()
        self._num_in_a_row = 0
        self._losses.append(loss)
        self._sizes.append(num_targets)
        return None

    def _is_spike(self, loss: float, typical: float, num_targets: int) -> bool:
        if not self._spike_deviations:
            return False
        distances = np.abs(np.array(self._losses) - typical)
        of_one = np.median(distances * np.sqrt(np.array(self._sizes)))
        deviation = _DEVIATIONS_PER_MAD * max(float(np.median(distances)), float(of_one) / math.sqrt(num_targets), 1e-6)
        return loss > typical + self._spike_deviations * deviation

    def state(self) -> dict[str, Any]:
        """JSON-ready; `load_state` reads it back exactly."""
        return {
            "losses": [loss.hex() for loss in self._losses],
            "sizes": list(self._sizes),
            "num_in_a_row": self._num_in_a_row,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._losses = deque((float.fromhex(loss) for loss in state["losses"]), maxlen=TYPICAL_STEPS)
        # Checkpoints of earlier versions do not know them.
        self._sizes = deque(state.get("sizes", [1] * len(self._losses)), maxlen=TYPICAL_STEPS)
        self._num_in_a_row = state["num_in_a_row"]


def write_set_aside(root: Path, why: SetAside, interactions: Interactions, *, keep: int) -> None:
    """Write what was set aside, again after a restart that repeats the step, and delete all but the newest `keep`.

    Raises OSError or PolarsError (disk full, say).
    """
    root.mkdir(parents=True, exist_ok=True)
    rows = pl.DataFrame({"user_id": interactions.user_id, **interactions.columns})
    for path, write, stage in (
        (root / f"{why.name}.parquet", rows.write_parquet, "trainer.set_aside_rows"),
        (
            root / f"{why.name}.json",
            lambda at: at.write_text(json.dumps(asdict(why)), encoding="utf-8"),
            "trainer.set_aside_written",
        ),
    ):
        unfinished = path.with_name(f"{path.name}{_UNFINISHED}")
        write(unfinished)
        unfinished.replace(path)
        fail_point(stage)
    for old in list_set_aside(root)[:-keep]:
        for suffix in (".json", ".parquet"):
            (root / f"{old.name}{suffix}").unlink(missing_ok=True)


def forget_users(root: Path, user_ids: Sequence[int]) -> None:
    """Remove every interaction of these users from what is kept. Raises OSError where not even deleting works.

    Files that cannot be read or written anew are deleted whole, and so is what a crash left unfinished: a person's
    right to be forgotten is worth more than a batch that somebody may want to look at.
    """
    for unfinished in root.glob(f"*{_UNFINISHED}"):
        unfinished.unlink()
    for path in root.glob("*.parquet"):
        unfinished = path.with_name(f"{path.name}{_UNFINISHED}")
        try:
            rows = pl.read_parquet(path)
            kept = rows.filter(~pl.col("user_id").is_in(list(user_ids)))
            if len(kept) < len(rows):
                kept.write_parquet(unfinished)
                unfinished.replace(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            unfinished.unlink(missing_ok=True)
            path.unlink()
            logger.error("%s is deleted, users cannot be removed from it: %s", path, error)  # noqa: TRY400 - says it all


def list_set_aside(root: Path) -> list[SetAside]:
    """What is kept, oldest first; files that say nothing (cut off by a power failure, say) are left out, loudly."""
    if not root.is_dir():
        return []
    kept = []
    for path in root.iterdir():
        if not _FILE.fullmatch(path.name):
            continue
        try:
            kept.append(read_record(SetAside, path.read_bytes()))
        except ValueError as error:
            logger.warning("%s cannot be read (%s): delete it", path, error)
    return sorted(kept, key=lambda why: (why.watermark_ms, why.name))


def read_interactions(root: Path, why: SetAside) -> pl.DataFrame:
    """The interactions that were set aside; FileNotFoundError if they are not kept any more, PolarsError if damaged."""
    return pl.read_parquet(root / f"{why.name}.parquet")
