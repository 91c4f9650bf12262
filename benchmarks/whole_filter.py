"""Ranks among what a user has not had at all, however little of a history the model reads.

The trainer's own test leaves out what the model has read. A model of longer histories then leaves out more, which alone
makes ranks better where nobody takes an item twice, also those of popularity. To compare lengths, all must leave out
the same.

Shapes: N events of the stream, P targets, S items seen by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_store.interactions import Interactions
from model.ranking import SeenRows
from online_trainer.config import TrainerConfig
from online_trainer.evaluation import Evaluation, StepTest
from online_trainer.examples import Examples

Int64s = NDArray[np.int64]


class SeenInStream:
    """What each event's user had had before it, of a stream in order of time."""

    def __init__(self, stream: Interactions) -> None:
        order = np.argsort(stream.user_id, kind="stable")
        users = stream.user_id[order]
        starts = np.flatnonzero(np.diff(users, prepend=users[:1] - 1))
        self._item_id = stream.item_id[order]
        self._end = np.empty(len(order), np.int64)
        self._end[order] = np.arange(len(order))
        self._start = np.empty(len(order), np.int64)
        self._start[order] = starts[np.searchsorted(starts, np.arange(len(order)), side="right") - 1]

    def before(self, events_P: Int64s) -> tuple[Int64s, Int64s]:
        """int64[S], item ids, and int64[P + 1], where those of each event begin."""
        start_P, length_P = self._start[events_P], self._end[events_P] - self._start[events_P]
        offsets = np.concatenate([[0], length_P.cumsum()])
        places_S = np.arange(offsets[-1]) + np.repeat(start_P - offsets[:-1], length_P)
        return self._item_id[places_S], offsets


class WholeFilterEvaluation(Evaluation):
    """The same test of a model that reads every event of a stream, with everything left out that a user has had."""

    def __init__(
        self,
        config: TrainerConfig,
        stream: Interactions,
        *,
        rows_of: Callable[[Int64s], Int64s],
        num_taken: Callable[[], int],
    ) -> None:
        """rows_of: item ids to rows, -1 for none. num_taken: events of the stream before those of the step."""
        super().__init__(config)
        self._seen, self._rows_of, self._num_taken = SeenInStream(stream), rows_of, num_taken

    def start(self, examples: Examples, rows_L: Tensor, target_rows_P: Tensor, *, num_known: int) -> StepTest:
        test = super().start(examples, rows_L, target_rows_P, num_known=num_known)
        assert bool(test.is_listed_P.all()), "every item is admitted"
        item_S, offsets = self._seen.before(self._num_taken() + examples.target_rows)
        rows_S = self._rows_of(item_S)
        assert (rows_S >= 0).all(), "no item is retired"
        seen = SeenRows(rows_S=torch.from_numpy(rows_S), offsets=torch.from_numpy(offsets)).distinct()
        tested = replace(test.tested, seen_place_S=seen.place_S.numpy(), seen_rows_S=seen.rows_S.numpy())
        return replace(test, tested=tested, seen=seen)
