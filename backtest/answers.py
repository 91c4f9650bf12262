"""Where answers go: rows of the run's tables, and what each arm cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from backtest.queries import Queries, Ranked, ShownLists
from backtest.run_files import UNKNOWN, ArmCosts, RunWriter
from model.ranking import MISS_RANK

Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answerer:
    """An arm and the publication that it answered with; number -1 and no watermark before the first."""

    arm: str
    number: int = -1
    watermark_ms: int | None = None


@dataclass(slots=True)
class _Spent:
    cpu_s: float = 0.0
    num_publications: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class Answers:
    """Writes rows, and adds up what was spent on whom."""

    writer: RunWriter
    _spent: dict[str, _Spent] = field(default_factory=dict)
    _inner_s: float = 0.0
    """CPU time of the blocks that have ended within the one that is open."""

    def ranked(self, who: Answerer, queries: Queries, ranked: Ranked) -> None:
        """Ranks and lists of one arm."""
        self.ranks(who, queries, ranked.rank_P, ranked.num_candidates)
        self.lists(who.arm, ranked.lists)

    def ranks(self, who: Answerer, queries: Queries, rank_P: Int64s, num_candidates: int) -> None:
        """Ranks of one arm."""
        count = len(queries)
        self.writer.add_ranks(
            who.arm,
            event=queries.event_P,
            rank=rank_P,
            num_candidates=np.full(count, num_candidates, np.int32),
            version=np.full(count, who.number, np.int32),
            weights_age_ms=np.full(count, UNKNOWN)
            if who.watermark_ms is None
            else queries.asked_ms_P - who.watermark_ms,
            history_age_ms=np.where(
                queries.history_ms_P >= 0, queries.asked_ms_P - queries.history_ms_P, np.int64(UNKNOWN)
            ),
        )

    def nothing(self, arm: str, queries: Queries) -> None:
        """An arm without weights misses."""
        self.ranks(Answerer(arm=arm), queries, np.full(len(queries), MISS_RANK), 0)

    def lists(self, arm: str, lists: ShownLists) -> None:
        """Lists of one arm."""
        if len(lists.event_S) == 0:
            return
        is_there_SK = lists.item_ids_SK >= 0
        self.writer.add_lists(
            arm,
            event=lists.event_S,
            item_ids=[ids[there].tolist() for ids, there in zip(lists.item_ids_SK, is_there_SK, strict=True)],
            probabilities=[p[there].tolist() for p, there in zip(lists.probabilities_SK, is_there_SK, strict=True)],
            target_probability=lists.target_probability_S,
        )

    @contextmanager
    def spending(self, arms: Sequence[str]) -> Iterator[None]:
        """CPU time of the block is the arms', in equal shares, but for blocks within it: those are their own arms'."""
        started_s, around_s, self._inner_s = time.process_time(), self._inner_s, 0.0
        try:
            yield
        finally:
            whole_s = time.process_time() - started_s
            for arm in arms:
                self._of(arm).cpu_s += (whole_s - self._inner_s) / len(arms)
            self._inner_s = around_s + whole_s

    def published(self, arm: str, num_bytes: int) -> None:
        """Count a publication."""
        spent = self._of(arm)
        spent.num_publications += 1
        spent.num_bytes += num_bytes

    def _of(self, arm: str) -> _Spent:
        return self._spent.setdefault(arm, _Spent())

    def costs(self) -> dict[str, ArmCosts]:
        """By arm."""
        return {
            arm: ArmCosts(
                cpu_s=round(spent.cpu_s, 3),
                num_publications=spent.num_publications,
                num_bytes_published=spent.num_bytes,
            )
            for arm, spent in sorted(self._spent.items())
        }

    def load_costs(self, costs: dict[str, ArmCosts]) -> None:
        """Go on from an earlier session's."""
        self._spent = {
            arm: _Spent(one.cpu_s, one.num_publications, one.num_bytes_published) for arm, one in costs.items()
        }
