"""The metrics of a run as Parquet: rows (step, interactions, watermark_ms, name, value), one per step and name.

`<root>/r0001/p0000000020.parquet`: runs are numbered, part files carry the first step they hold. A run begins without
a checkpoint and goes on through every resume. The part that grows is written anew under another name and renamed, so
readers of `*.parquet` see whole parts at any moment.

Rows are flushed before a checkpoint is written, and rows of steps that a resumed trainer is about to repeat are
removed when it starts: the rows are then the same as those of a run that was never interrupted. A crash loses no row
of a step that is in a checkpoint; the others come again.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import polars as pl

from model.disk import Disk
from stream.failpoints import fail_point

logger = logging.getLogger(__name__)

SCHEMA: Final = {
    "step": pl.Int64,
    "interactions": pl.Int64,
    "watermark_ms": pl.Int64,
    "name": pl.String,
    "value": pl.Float64,
}

VALUES_PER_PART: Final = 100_000
"""A part with as many values is closed: what a flush writes again stays at about 0.7 MB, 0.1 s."""
_VALUES_WAITING_MAX: Final = 10 * VALUES_PER_PART
"""While the disk takes nothing, the oldest values beyond these are given up."""


@dataclass(frozen=True, slots=True)
class _Sample:
    step: int
    interactions: int
    watermark_ms: int
    values: Mapping[str, float]


class MetricsFile:
    """Appends samples of one run. ``add`` is for the training thread, ``flush`` for any one other."""

    def __init__(self, root: Path, *, keep_parts: int, disk: Disk | None = None) -> None:
        self._root, self._keep_parts, self._disk = root, keep_parts, disk or Disk()
        self._lock = threading.Lock()
        self._samples: list[_Sample] = []
        """Of the part that grows, in order of steps."""
        self._num_values = 0
        self._written_step = -1
        """Samples up to this step are on disk."""
        self._run: Path | None = None

    def begin(self, step: int) -> Path:
        """Continue the newest run after `step`, whose later rows are removed; 0: a new run. Its folder, made by flush.

        Call before the first ``add``. Raises OSError.
        """
        runs = _runs(self._root)
        if step and runs:
            self._run = runs[-1]
            for unfinished in self._run.glob("*.unfinished"):
                self._disk.remove_file(unfinished)
            self._forget_after(step)
        else:
            newest = int(runs[-1].name[1:]) if runs else 0
            self._run = self._root / f"r{newest + 1:04d}"
        return self._run

    def _forget_after(self, step: int) -> None:
        """Remove the rows of later steps, the newest first: what is left is a beginning of the run at any moment."""
        assert self._run is not None
        for part in reversed(parts(self._run)):
            if _first_step(part) > step:
                self._disk.remove_file(part)
                continue
            # Only the last one left can reach beyond the step.
            try:
                rows = pl.read_parquet(part)
            except pl.exceptions.PolarsError as error:
                self._disk.rename(part, part.with_suffix(".damaged"))
                logger.error("%s cannot be read and is set aside: %s", part, error)  # noqa: TRY400 - says it all
                continue
            kept = rows.filter(pl.col("step") <= step)
            if len(kept) < len(rows):
                self._write(part, kept)
            return

    def add(self, *, step: int, interactions: int, watermark_ms: int, values: Mapping[str, float]) -> None:
        """Note the metrics after a step; steps ascend."""
        with self._lock:
            assert not self._samples or self._samples[-1].step < step
            self._samples.append(_Sample(step, interactions, watermark_ms, dict(values)))
            self._num_values += len(values)
            while self._num_values > _VALUES_WAITING_MAX:
                lost = self._samples.pop(0)
                self._num_values -= len(lost.values)
                logger.error("metrics of step %d are given up: they could not be written", lost.step)

    def flush(self) -> None:
        """Write what was added since the last time; durable on return. Raises OSError with nothing lost."""
        with self._lock:
            samples = list(self._samples)
        if not samples or samples[-1].step <= self._written_step:
            return
        assert self._run is not None, "begin() comes first"
        self._disk.make_dir(self._run)
        self._write(self._run / f"p{samples[0].step:010d}.parquet", _table(samples))
        self._written_step = samples[-1].step
        if sum(len(sample.values) for sample in samples) >= VALUES_PER_PART:
            with self._lock:  # more may have come meanwhile
                self._samples = [sample for sample in self._samples if sample.step > self._written_step]
                self._num_values = sum(len(sample.values) for sample in self._samples)
        for old in parts(self._run)[: -self._keep_parts]:
            self._disk.remove_file(old)

    def _write(self, part: Path, rows: pl.DataFrame) -> None:
        content = io.BytesIO()
        rows.write_parquet(content, compression="zstd")
        unfinished = part.with_suffix(".unfinished")
        self._disk.write(unfinished, content.getvalue())
        fail_point("trainer.metrics_part")
        self._disk.rename(unfinished, part)
        self._disk.sync_dir(part.parent)
        fail_point("trainer.metrics_written")


def parts(run: Path) -> list[Path]:
    """The part files of a run, in order of steps."""
    return sorted(run.glob("p*.parquet"))


def _runs(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("r*") if path.is_dir() and path.name[1:].isdecimal())


def _first_step(part: Path) -> int:
    return int(part.stem[1:])


def _table(samples: list[_Sample]) -> pl.DataFrame:
    steps = pl.DataFrame(
        {
            "step": [sample.step for sample in samples],
            "interactions": [sample.interactions for sample in samples],
            "watermark_ms": [sample.watermark_ms for sample in samples],
            "name": [list(sample.values) for sample in samples],
            "value": [list(sample.values.values()) for sample in samples],
        },
        schema={name: pl.List(kind) if name in {"name", "value"} else kind for name, kind in SCHEMA.items()},
    )
    return steps.explode("name", "value")
