"""A candidate beside the weights in service: it answers a share of live requests again, and nobody sees its answers.

Both answer in one piece of work of the model thread, so from the same histories at the same time, and what differs is
the weights' doing. A comparison holds the thread for about two answers; live requests go in between.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
from torch import Tensor

from model.config import ModelConfig
from serving.batcher import ModelThread
from serving.config import ServingConfig
from serving.divergence import Divergence
from serving.errors import AdminRefusedError
from serving.item_categories import CategoryRows
from serving.item_names import ItemNames
from serving.item_search import ExactSearch
from serving.queries import Query, Ranking
from serving.ranker import Ranker, RankerParts
from serving.ranking_head import RankingHead
from serving.recommending import ItemChooser
from serving.swap import SnapshotReader
from serving.user_states import UserEncoder
from serving.weights import PreparedSwap, ServedWeights
from stream.clock import Clock

logger = logging.getLogger(__name__)

Answer = Callable[[Sequence[Query]], list[Ranking]]

_WAITING_MAX: Final = 64
_LOOK_S: Final = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowParts:
    """What shadowing needs of the worker."""

    config: ServingConfig
    model_config: ModelConfig
    live: RankerParts
    reader: SnapshotReader
    """One of its own: what it refuses is no concern of the swapper's."""
    names: ItemNames
    model_thread: ModelThread
    query_now_ms: Callable[[], int]
    clock: Clock
    random: random.Random
    """Chooses requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shadow:
    version: int
    share: float
    since_ms: int
    memory_bytes: int
    ranker: Ranker
    divergence: Divergence


class Shadowing:
    """At most one candidate at a time; its weights are in memory only meanwhile."""

    def __init__(self, parts: ShadowParts) -> None:
        self._parts, self._live = parts, Ranker(parts.live)
        self._shadow: _Shadow | None = None
        self._waiting: deque[Query] = deque()
        self._changing = asyncio.Lock()
        self.num_skipped = self.num_failed = 0

    def watched(self, answer: Answer) -> Answer:
        """The same answers; a share of the queries is put aside. In the model thread."""

        def watch(queries: Sequence[Query]) -> list[Ranking]:
            shadow = self._shadow
            if shadow is not None:
                for query in queries:
                    if self._parts.random.random() < shadow.share:
                        self._put_aside(query)
            return answer(queries)

        return watch

    def _put_aside(self, query: Query) -> None:
        if len(self._waiting) < _WAITING_MAX:
            self._waiting.append(query)
        else:
            self.num_skipped += 1

    async def start(self, version: int, share: float) -> None:
        """Load a version aside and begin to compare, in place of another. Raises AdminRefusedError."""
        async with self._changing:
            prepared = await asyncio.to_thread(self._load, version)
            weights = ServedWeights(self._parts.model_config, self._parts.live.weights.withheld)
            weights.swap(prepared)
            self._waiting.clear()
            self.num_skipped = self.num_failed = 0
            self._shadow = _Shadow(
                version=version,
                share=share,
                since_ms=self._parts.clock.now_ms(),
                memory_bytes=_memory_bytes(weights),
                ranker=self._ranker(weights),
                divergence=Divergence(),
            )

    async def stop(self) -> int | None:
        """Let go of the candidate; its version, if there was one."""
        async with self._changing:
            shadow, self._shadow = self._shadow, None
            self._waiting.clear()
            return None if shadow is None else shadow.version

    async def run(self) -> None:
        """Compare what was put aside until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            while self._waiting:
                comparing = self._parts.model_thread.run(partial(self._compare, self._waiting.popleft()))
                (error,) = await asyncio.gather(comparing, return_exceptions=True)
                if error is not None:
                    self._note_failure(error)

    def _note_failure(self, error: BaseException) -> None:
        """A candidate that cannot answer is a finding about the candidate, and no end of the worker."""
        if not self.num_failed:
            logger.error("a request could not be answered a second time, by the version aside", exc_info=error)
        self.num_failed += 1

    def _compare(self, query: Query) -> None:
        shadow, now_ms = self._shadow, self._parts.query_now_ms()
        if shadow is None:
            return
        (served,), (candidate,) = self._live.answer([query], now_ms), shadow.ranker.answer([query], now_ms)
        shadow.divergence.add(served, candidate)

    def _load(self, version: int) -> PreparedSwap:
        refused = self._parts.reader.refused
        refused.clear()
        prepared = self._parts.reader.prepare(have=None, want=version)
        if prepared is None or prepared.newest.version != version:
            why = next(reversed(refused.values()), "it is not there")
            raise AdminRefusedError(
                f"version {version} cannot be loaded beside the one in service: {why}",
                status=409,
                code="snapshot_refused",
            )
        self._parts.names.resolve(prepared.item_ids())
        return prepared

    def _ranker(self, weights: ServedWeights) -> Ranker:
        parts, live = self._parts, self._parts.live
        rows = CategoryRows(weights, live.categories)
        # A byte holds no state of a user, and 0 would have histories read from other starts than in service.
        keeping_none = replace(parts.config, user_state_bytes=min(1, parts.config.user_state_bytes))
        return Ranker(
            replace(
                live,
                weights=weights,
                encoder=UserEncoder(keeping_none, weights),
                chooser=ItemChooser(parts.config, weights, ExactSearch(weights), rows),
                head=RankingHead(weights, live.head.settings),
            )
        )

    def report(self) -> dict[str, Any] | None:
        """What has been found so far, JSON-ready; None without a candidate."""
        shadow = self._shadow
        if shadow is None:
            return None
        live = self._parts.live.weights.info
        return {
            "version": shadow.version,
            "against": None if live is None else live.version,
            "share": shadow.share,
            "since_ms": shadow.since_ms,
            "memory_bytes": shadow.memory_bytes,
            "num_skipped": self.num_skipped,
            "num_failed": self.num_failed,
            **asdict(shadow.divergence.report()),
        }


def _memory_bytes(weights: ServedWeights) -> int:
    """Of the second set of weights: parameters, item table and the catalogue made ready for scoring.

    Of the table, the rows in use: the others are reserved, and take no memory.
    """
    catalogue, num_items = weights.catalogue(), weights.items.num_items
    held = [
        *weights.recommender.parameters(),
        *(one[:num_items] for one in weights.items.storage() if isinstance(one, Tensor | np.ndarray)),
        catalogue.unit_VD,
        catalogue.offset_V,
    ]
    return sum(one.nbytes for one in held)
