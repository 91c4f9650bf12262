"""Goes back to the version before when a guard trips: watches, decides, remembers, says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Final

from model.errors import ModelError
from model.rejection import Rejection
from serving.batcher import ModelThread
from serving.guard_config import GuardConfig
from serving.guards import Judgement, SwapGuards, judge
from serving.instruments import ServingInstruments
from serving.queries import Query, Ranking
from serving.version_choice import VersionChoice
from serving.weights import ServedWeights
from stream.clock import Clock

logger = logging.getLogger(__name__)

Answer = Callable[[Sequence[Query]], list[Ranking]]

_SHOWN: Final = 10
"""Rejections in `/status`, the newest."""


class SwapGuardian:
    """Watches answers in the model thread, judges aside, and turns versions away."""

    def __init__(
        self,
        config: GuardConfig,
        choice: VersionChoice,
        model_thread: ModelThread,
        *,
        replica: str,
        clock: Clock,
        instruments: ServingInstruments,
    ) -> None:
        self._config, self._choice, self._model_thread = config, choice, model_thread
        self._replica, self._clock, self._instruments = replica, clock, instruments
        self._guards = SwapGuards(config)
        self._last: Judgement | None = None
        self.num_trips = 0

    @property
    def good(self) -> int | None:
        """The version to go back to."""
        return self._guards.good

    def watched(self, answer: Answer, weights: ServedWeights) -> Answer:
        """The same answers, seen by the guards; in the model thread."""
        if not self._config.enabled:
            return answer

        def watch(queries: Sequence[Query]) -> list[Ranking]:
            if weights.info is None:
                return answer(queries)
            version, started_s = weights.info.version, self._clock.monotonic_s()
            try:
                rankings = answer(queries)
            except BaseException:
                self._guards.failed(version, len(queries))
                raise
            self._guards.answered(version, queries, rankings, (self._clock.monotonic_s() - started_s) * 1000)
            return rankings

        return watch

    async def run(self, look_at_once: Callable[[], None]) -> None:
        """Judge what can be judged, again and again, until cancelled. `look_at_once`: has the swapper choose anew."""
        while self._config.enabled:
            await asyncio.sleep(self._config.check_ms / 1000)
            if await self.check():
                look_at_once()

    async def check(self) -> bool:
        """Judge once; True if versions were turned away."""
        case = await self._model_thread.run(self._guards.due)
        if case is None:
            return False
        judgement = await asyncio.to_thread(judge, self._config, case)
        self._last = judgement
        if judgement.guard is None or await self._is_wanted(judgement):
            await self._model_thread.run(lambda: self._guards.passed(judgement))
            self._choice.passed()
            logger.debug("versions %s pass the guards: %s", case.versions, judgement.evidence)
            return False
        await self._turn_away(judgement, judgement.guard)
        return True

    async def _is_wanted(self, judgement: Judgement) -> bool:
        """Whether the newest version is pinned: an operator knows better."""
        version = judgement.case.versions[-1]
        try:
            wanted = await asyncio.to_thread(self._choice.is_pinned, version)
        except (ModelError, OSError):
            wanted = False
        if wanted:
            logger.error("version %d is pinned and stays, although %s", version, _sentence(judgement))
        return wanted

    async def _turn_away(self, judgement: Judgement, guard: str) -> None:
        back_to = judgement.case.against
        assert back_to is not None, "nothing is judged without a version to compare with"
        # Versions that came while this was judged build on it.
        versions = sorted({*judgement.case.versions, *self._guards.suspects})
        rejections = [
            Rejection(
                version=version,
                back_to=back_to,
                replica=self._replica,
                at_ms=self._clock.now_ms(),
                guard=guard,
                sentence=judgement.sentence,
                evidence=judgement.evidence,
            )
            for version in versions
        ]
        self.num_trips += 1
        self._instruments.guard_tripped(guard)
        logger.error("going back from version %d to %d: %s", versions[-1], back_to, _sentence(judgement))
        await asyncio.to_thread(self._choice.turn_away, rejections)
        await self._model_thread.run(self._guards.turned_away)

    def status(self) -> dict[str, object]:
        """JSON-ready: what passed, what is being watched, what was turned away and why."""
        last = self._last
        return {
            "enabled": self._config.enabled,
            "passed": self._guards.good,
            "watching": list(self._guards.suspects),
            "trips": self.num_trips,
            "waits_s": self._choice.waits_s,
            "last": None if last is None else {"guard": last.guard, "sentence": last.sentence, **last.evidence},
            "rejected": [asdict(one) for one in self._choice.rejections[-_SHOWN:]],
        }


def _sentence(judgement: Judgement) -> str:
    figures = ", ".join(f"{name} {value:.3g}" for name, value in judgement.evidence.items())
    return f"{judgement.guard}: {judgement.sentence} ({figures})"
