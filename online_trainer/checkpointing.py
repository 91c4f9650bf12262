"""When the trainer's checkpoints are due, and writing them beside the training."""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from functools import partial
from typing import Any

from online_trainer.checkpoint import Checkpoint, write_checkpoint
from online_trainer.errors import CheckpointError
from online_trainer.metrics_file import MetricsFile
from online_trainer.parts import TrainerParts
from online_trainer.worker_thread import WorkerThread

logger = logging.getLogger(__name__)


class Checkpointing:
    """One checkpoint at a time, with the metrics of the steps up to it written first."""

    def __init__(self, parts: TrainerParts, metrics_file: MetricsFile, *, step: int) -> None:
        """step: of the newest checkpoint there is, 0 without one."""
        self._root, self._config, self._clock = parts.checkpoint_root, parts.config, parts.clock
        self._metrics_file = metrics_file
        self._newest_step, self._begun_s = step, parts.clock.monotonic_s()
        self._is_writing = False
        # A thread of their own: a snapshot does not wait while a checkpoint, many times its size, is synced to disk.
        self._thread = WorkerThread("trainer-checkpoints")

    def is_due(self, step: int) -> bool:
        """Whether it is time for one, `step` being the newest."""
        waited_s = self._clock.monotonic_s() - self._begun_s
        return not self._is_writing and waited_s >= self._config.checkpoint_interval_s and self.is_behind(step)

    def is_behind(self, step: int) -> bool:
        """Whether anything was learned since the newest checkpoint."""
        return step > self._newest_step

    def begin(self, checkpoint: Checkpoint) -> Coroutine[Any, Any, None]:
        """From now on one is being written; the work itself, to be awaited."""
        self._is_writing, self._begun_s = True, self._clock.monotonic_s()
        return self._write(checkpoint)

    async def _write(self, checkpoint: Checkpoint) -> None:
        try:
            await self._thread.run(partial(self._save, checkpoint))
            self._newest_step = checkpoint.step
        except CheckpointError as error:
            logger.error("%s; the checkpoint before it stays", error)  # noqa: TRY400 - the sentence says it all
        finally:
            self._is_writing = False

    def _save(self, checkpoint: Checkpoint) -> None:
        try:
            # First: what a checkpoint holds does not come again, so its metrics must be there already.
            self._metrics_file.flush()
        except OSError as error:
            logger.error("metrics could not be written: %s; trying again", error)  # noqa: TRY400 - says it all
        write_checkpoint(self._root, checkpoint, keep=self._config.keep_checkpoints)

    def end(self) -> None:
        """Finish what is being written; blocking."""
        self._thread.end()
