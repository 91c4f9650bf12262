"""Hop F4: the first answer of this replica that was computed with a snapshot, and how old its events were by then."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from opentelemetry import trace

from feature_store.errors import FeatureStoreError
from feature_store.store import FeatureStore
from model.manifest import Manifest
from stream.freshness import F4_ANSWERED, AgeHistogram, AgePair, FreshnessRecorder
from stream.tracing import link_to

logger = logging.getLogger(__name__)

_WAITING_MAX: Final = 10_000
"""Versions that may wait for an answer, or for the store; older ones are given up."""
_LOOK_BACK: Final = 1_000
"""Versions before the one loaded at start among which an earlier life's answers are looked for."""
_RETRY_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class _Expected:
    """A version in service, and since when it or a later one that made up for it is."""

    manifest: Manifest
    swapped_at_ms: int


@dataclass(frozen=True, slots=True)
class _Answered:
    expected: tuple[_Expected, ...]
    at_ms: int
    span: trace.Span
    """Of the answer."""


class FirstAnswers:
    """Records, off the answers' path, when each version was first answered with."""

    def __init__(self, store: FeatureStore, model: str, replica: str, mode: str) -> None:
        self._store, self._model, self._replica = store, model, replica
        self._waiting: deque[_Expected] = deque(maxlen=_WAITING_MAX)
        self._answered: deque[_Answered] = deque(maxlen=_WAITING_MAX)
        self._answered_up_to = 0
        self._new = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="first-answers")
        self._freshness = FreshnessRecorder(F4_ANSWERED, mode=mode)

    def summary(self, now_ms: int) -> dict[str, object]:
        """Ages of what this replica has answered with, for status pages."""
        return self._freshness.summary(now_ms)

    def answered_up_to(self, version: int) -> int | None:
        """The newest version up to `version` that this replica has answered with, as the store knows. Blocking."""
        try:
            served = self._store.first_served(self._model, max(0, version - _LOOK_BACK))
        except FeatureStoreError as error:
            logger.debug("what this replica answered with before is not known: %s", error)
            return None
        return max((one.version for one in served if one.replica == self._replica), default=None)

    def expect(self, manifests: Sequence[Manifest], now_ms: int) -> None:
        """These versions are in service from now on; their first answer is yet to come."""
        for manifest in manifests:
            newest = self._waiting[-1].manifest.version if self._waiting else self._answered_up_to
            if manifest.version > newest:
                self._waiting.append(_Expected(manifest, now_ms))

    def answered(self, version: int, at_ms: int) -> None:
        """An answer was computed with `version` (and so with everything that earlier ones contain)."""
        if not self._waiting or self._waiting[0].manifest.version > version:
            return
        expected = []
        while self._waiting and self._waiting[0].manifest.version <= version:
            expected.append(self._waiting.popleft())
        # The end of each event's path: the answer links to what published the weights it was computed with.
        span = trace.get_current_span()
        for one in expected:
            for link in link_to(one.manifest.traceparent):
                span.add_link(link.context)
        self._answered_up_to = version
        self._answered.append(_Answered(tuple(expected), at_ms, span))
        self._new.set()

    async def run(self) -> None:
        """Record what was answered until cancelled; a store that is away is waited for."""
        while True:
            await self._new.wait()
            self._new.clear()
            if not await self._record():
                self._new.set()
                await asyncio.sleep(_RETRY_S)

    async def flush(self) -> None:
        """Record what is left, once, when the worker stops."""
        await self._record()
        self._executor.shutdown(wait=True)

    async def _record(self) -> bool:
        """True when nothing is left to record."""
        while self._answered:
            answered = self._answered.popleft()
            try:
                await asyncio.get_running_loop().run_in_executor(self._executor, self._record_one, answered)
            except FeatureStoreError as error:  # away, or its tables are: StoreWatch says which
                logger.debug("first answers are recorded later: %s", error)
                self._answered.appendleft(answered)
                return False
        return True

    def _record_one(self, answered: _Answered) -> None:
        for one in answered.expected:
            self._store.record_first_served(
                self._model,
                one.manifest.version,
                self._replica,
                answered.at_ms,
                swapped_at_ms=one.swapped_at_ms,
            )
        # After the store has it: what is tried again must not be counted twice.
        for manifest in (one.manifest for one in answered.expected):
            ages = AgePair(_ages(manifest.event_age), _ages(manifest.append_age))
            later = ages.shifted(answered.at_ms - manifest.created_at_ms)
            self._freshness.record_ages(later, answered.at_ms, answered.span)


def _ages(stored: dict[str, object]) -> AgeHistogram:
    return AgeHistogram.from_dict(stored) if stored else AgeHistogram()
