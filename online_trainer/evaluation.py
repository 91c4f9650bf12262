"""The test before each update: the model and the baselines rank what comes next, then the baselines learn it.

One pass over the model's logits and one sorted copy of the popularity serve all metrics.

Shapes: L packed positions, P supervised ones, V catalogue rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.item_table import RowMoves
from model.ranking import MISS_RANK, SeenPairs, ranks, seen_before
from online_trainer.baselines import BASELINES, Baselines, EvaluatedTargets
from online_trainer.config import TrainerConfig
from online_trainer.examples import Examples
from online_trainer.followers import Followers
from online_trainer.prequential import ALL, MeasuredRanks, PrequentialMeter, cells

Int64s = NDArray[np.int64]

ARMS = ("model", *BASELINES)
"""What is evaluated on the same interactions: the model, and the baselines to beat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTest:
    """One micro-batch under test: ``on_logits`` is for the supervised pass. Made by ``Evaluation.start``.

    listed_rows: the targets with a row, which alone the model ranks; is_listed_P: which those are. seen: of those.
    """

    tested: EvaluatedTargets
    listed_rows: Tensor
    is_listed_P: Tensor
    seen: SeenPairs
    times_ms_P: Int64s
    cells_P: Int64s
    parts: list[Tensor] = field(default_factory=list)

    def on_logits(self, part: slice, logits_pV: Tensor) -> None:
        """Rank listed targets part.start … part.stop - 1 by the model's logits over the whole live catalogue.

        What a step replays comes behind them, and is not tested.
        """
        part = slice(part.start, min(part.stop, self.listed_rows.shape[0]))
        if part.start >= part.stop:
            return
        logits_pV = logits_pV[: part.stop - part.start]
        targets_p = self.listed_rows[part].to(logits_pV.device)
        seen = self.seen.of_targets(part, device=logits_pV.device)
        self.parts.append(ranks(logits_pV, targets_p, seen, num_known=self.tested.num_known))


class Evaluation:
    """Prequential metrics of the model and of the baselines, a function of the micro-batches in their order."""

    def __init__(self, config: TrainerConfig) -> None:
        self._new_below = config.metrics_new_below
        self._meter = PrequentialMeter(ARMS, config.metrics_window)
        self._baselines = Baselines(
            half_life_s=config.baseline_half_life_h * 3600,
            followers=Followers(max_items=config.cooccurrence_items, per_item=config.cooccurrence_followers),
        )
        self._num_interactions = np.zeros(0, np.int64)
        """Of each row, before the current micro-batch."""

    def start(self, examples: Examples, rows_L: Tensor, target_rows_P: Tensor, *, num_known: int) -> StepTest:
        """Prepare the test of a micro-batch. Rows from num_known on, or -1: items that were not known before it."""
        offsets, positions_P = torch.from_numpy(examples.offsets), torch.from_numpy(examples.positions)
        seen = seen_before(rows_L, offsets, positions_P).distinct()
        is_listed_P = target_rows_P >= 0
        targets, last = target_rows_P.numpy(), rows_L[positions_P].numpy()
        starts_P = examples.offsets[np.searchsorted(examples.offsets, examples.positions, side="right") - 1]
        is_known_user_P = examples.positions + 1 - starts_P >= self._new_below
        return StepTest(
            tested=EvaluatedTargets(
                last_rows_P=last,
                target_rows_P=targets,
                seen_place_S=seen.place_S.numpy(),
                seen_rows_S=seen.rows_S.numpy(),
                num_known=num_known,
            ),
            listed_rows=target_rows_P[is_listed_P],
            is_listed_P=is_listed_P,
            seen=_of_listed(seen, is_listed_P),
            times_ms_P=examples.query_time_ms[examples.positions],
            cells_P=cells(self._item_kinds(targets, num_known), is_known_user_P.astype(np.int64)),
        )

    def _item_kinds(self, rows_P: Int64s, num_known: int) -> Int64s:
        """int64[P]: index into ITEM_KINDS."""
        self._reserve(num_known)
        in_catalogue_P = (rows_P >= 0) & (rows_P < num_known)
        kinds_P = np.zeros(len(rows_P), np.int64)
        kinds_P[in_catalogue_P] = 1 + (self._num_interactions[rows_P[in_catalogue_P]] >= self._new_below)
        return kinds_P

    def finish(self, test: StepTest) -> dict[str, Int64s]:
        """Take the ranks into the metrics, then let the baselines count what came next after what; int64[P] by arm."""
        tested = test.tested
        model_P = torch.full(test.is_listed_P.shape, MISS_RANK)
        model_P[test.is_listed_P] = torch.cat([part.cpu() for part in test.parts] or [model_P[:0]])
        found = {"model": model_P.numpy(), **self._baselines.ranks(tested)}
        self._meter.add(found, test.cells_P)
        self._baselines.observe_transitions(tested.last_rows_P, tested.target_rows_P, test.times_ms_P)
        return found

    def observe(self, rows: Int64s, times_ms: Int64s) -> None:
        """Count a micro-batch's interactions, after it was tested; int64[N], rows of -1 are left out."""
        self._baselines.observe(rows, times_ms)
        rows = rows[rows >= 0]
        self._reserve(int(rows.max(initial=-1)) + 1)
        np.add.at(self._num_interactions, rows, 1)

    def follow(self, moves: RowMoves) -> None:
        """Forget what was counted of removed items, and move the rest as ``ItemTable.remove`` moved the rows."""
        self._reserve(moves.num_before)
        moves.follow(torch.from_numpy(self._num_interactions))
        self._baselines.follow(moves)

    def _reserve(self, num_rows: int) -> None:
        if num_rows > (size := len(self._num_interactions)):
            self._num_interactions = np.pad(self._num_interactions, (0, max(num_rows - size, size)))

    def measured(self) -> list[MeasuredRanks]:
        """Every arm, span and group; from any thread."""
        return self._meter.measured()

    def summary(self) -> dict[str, float]:
        """`arm.span.metric` over all groups; absent before the first."""
        return _named([one for one in self.measured() if one.group == ALL])

    def detailed(self) -> dict[str, float]:
        """``summary`` and `arm.span.group.metric`."""
        return _named(self.measured())

    def state(self) -> dict[str, Tensor]:
        """Copies of everything that a later metric depends on."""
        parts = {"meter": self._meter.state(), "baselines": self._baselines.state()}
        arrays = {f"{part}.{name}": array for part, state in parts.items() for name, array in state.items()}
        arrays["num_interactions"] = self._num_interactions.copy()
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a ``state``."""

        def part(prefix: str) -> dict[str, NDArray[np.generic]]:
            return {n.removeprefix(prefix): t.numpy() for n, t in state.items() if n.startswith(prefix)}

        self._meter.load_state(part("meter."))
        self._baselines.load_state(part("baselines."))
        self._num_interactions = state["num_interactions"].numpy().copy()


def _of_listed(seen: SeenPairs, is_listed_P: Tensor) -> SeenPairs:
    """The pairs of some targets, numbered among those."""
    kept_S = is_listed_P[seen.place_S]
    number_P = is_listed_P.cumsum(0) - 1
    return SeenPairs(place_S=number_P[seen.place_S[kept_S]], rows_S=seen.rows_S[kept_S])


def _named(measured: list[MeasuredRanks]) -> dict[str, float]:
    return {name: value for one in measured for name, value in one.named().items()}
