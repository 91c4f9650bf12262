"""Named places where a fault test can kill the process, so that every crash point is reproducible.

`HEADRACE_FAIL_POINT=ingest.produced:3` kills the process with SIGKILL when it reaches `ingest.produced` for the
third time. Without the variable a fail point costs one comparison.
"""

from __future__ import annotations

import os
import signal
from typing import Final

FAIL_POINTS: Final = (
    "ingest.locked",
    "ingest.appended",
    "ingest.produced",
    "ingest.positioned",
    "ingest.committed",
    "ingest.advised",
    "labels.applied",
    "labels.produced",
    "labels.committed",
    "trainer.trained",
    "trainer.set_aside_rows",
    "trainer.set_aside_written",
    "trainer.metrics_part",
    "trainer.metrics_written",
    "trainer.checkpoint_tensors",
    "trainer.checkpoint_synced",
    "trainer.labels_learned",
    "trainer.checkpoint_written",
    "trainer.checkpoints_pruned",
    "trainer.snapshot_encoded",
    "trainer.snapshot_files",
    "trainer.snapshot_ready",
    "trainer.snapshot_written",
    "trainer.snapshot_recorded",
    "trainer.snapshots_pruned",
    "trainer.publications_pruned",
    "trainer.snapshot_announced",
    "upstream.computed",
    "upstream.written",
    "upstream.committed",
    "upstream.labels_learned",
    "upstream.learned",
    "upstream.version_written",
    "upstream.version_begun",
    "upstream.version_served",
    "serving.swapped",
)
"""Every fail point, for the tests that visit them all."""

_name, _, _count = os.environ.get("HEADRACE_FAIL_POINT", "").partition(":")
_remaining = int(_count or 1)


def fail_point(name: str) -> None:
    """Kill this process here, if the environment asks for it."""
    if name != _name:
        return
    assert name in FAIL_POINTS, name
    global _remaining  # noqa: PLW0603 - a countdown per process is the point
    _remaining -= 1
    if _remaining == 0:
        os.kill(os.getpid(), signal.SIGKILL)
