"""Which version a worker takes: what the pointer says, but nothing that guards have turned away."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from model.errors import ModelError
from model.rejection import Rejection, read_rejection, read_rejections, write_rejection
from model.snapshot import read_pin
from model.storage import SnapshotRoot, open_storage
from serving.guard_config import GuardConfig
from stream.clock import Clock

logger = logging.getLogger(__name__)

_DOUBLINGS_MAX: Final = 6
_REMEMBERED: Final = 1_000
"""Versions that were turned away; what the pointer may still name is among the newest."""


class VersionChoice:
    """Remembers what was turned away, here and by others, and for how long newer versions wait. Blocking."""

    def __init__(self, root: SnapshotRoot, model: str, config: GuardConfig, clock: Clock) -> None:
        self._storage, self._model, self._config, self._clock = open_storage(root), model, config, clock
        self._rejections: dict[int, Rejection] = {}
        self._num_trips = 0
        self._wait_until_s = 0.0

    @property
    def rejections(self) -> list[Rejection]:
        """What this worker has turned away, or has heard that others have; by version."""
        return [self._rejections[version] for version in sorted(self._rejections)]

    @property
    def waits_s(self) -> float:
        """How long newer versions are not taken yet."""
        return max(0.0, self._wait_until_s - self._clock.monotonic_s())

    def choose(self, *, have: int | None, pointer: int) -> int | None:
        """The version to go to, None to stay. Raises ModelError or OSError if the storage cannot be asked."""
        if not self._config.enabled:
            return pointer
        if pointer != have and pointer not in self._rejections:
            self._hear_of(pointer)
        rejection = self._rejections.get(pointer)
        if rejection is None and (have is None or pointer <= have or not self.waits_s):
            return pointer
        if rejection is not None and self.is_pinned(pointer):
            return pointer
        # A worker that has nothing takes what others went back to; one that runs a version is not moved by others.
        left = self._rejections.get(have) if have is not None else rejection
        return None if left is None else self._good_of(left)

    def is_pinned(self, version: int) -> bool:
        """Whether an operator wants this version whatever guards say. Raises ModelError or OSError."""
        pin = read_pin(self._storage, self._model)
        return pin is not None and pin.version == version

    def turn_away(self, rejections: Iterable[Rejection]) -> None:
        """Never take these again, tell the other workers, and wait with newer ones."""
        # Newer versions wait from now on, not only once the storage has answered.
        wait_ms = self._config.cooldown_ms * 2 ** min(self._num_trips, _DOUBLINGS_MAX)
        self._num_trips += 1
        self._wait_until_s = self._clock.monotonic_s() + wait_ms / 1000
        for rejection in rejections:
            self._remember(rejection)
            try:
                write_rejection(self._storage, self._model, rejection)
            except (ModelError, OSError) as error:
                logger.warning("version %d is turned away here, others are not told: %s", rejection.version, error)

    def passed(self) -> None:
        """A version passed the guards: trips are not in a row any more."""
        self._num_trips = 0

    def _hear_of(self, version: int) -> None:
        rejection = read_rejection(self._storage, self._model, version)
        if rejection is not None:
            logger.warning(
                "version %d is not taken, %s turned it away: %s", version, rejection.replica, rejection.sentence
            )
            for one in read_rejections(self._storage, self._model):
                self._remember(one)

    def _remember(self, rejection: Rejection) -> None:
        self._rejections[rejection.version] = rejection
        while len(self._rejections) > _REMEMBERED:
            del self._rejections[min(self._rejections)]

    def _good_of(self, rejection: Rejection) -> int | None:
        """The version at the end of a line of those who were turned away for one another."""
        good = rejection.back_to
        while (next_one := self._rejections.get(good)) is not None and next_one.back_to < good:
            good = next_one.back_to
        return None if good in self._rejections else good
