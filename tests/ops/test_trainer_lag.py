"""A burst that outruns a real trainer process, with a real broker and a real database."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ops.test_kill import LearningInstallation, headrace, ingest_everything, installation

__all__ = ["installation"]

pytestmark = pytest.mark.timeout(600)

BURST = 3_000


def test_a_burst_is_thinned_counted_and_verified(installation: LearningInstallation) -> None:
    installation.send(BURST)
    ingest_everything(installation)
    trainer = installation.start(
        "train",
        HEADRACE_TRAINER__LAG_POLICY="thin",
        HEADRACE_TRAINER__LAG_INTERACTIONS="500",
        HEADRACE_TRAINER__MAX_PENDING_INTERACTIONS="1000",
        # What is left is less than a batch: it does not wait for more.
        HEADRACE_TRAINER__BATCH_WAIT_MS="250",
    )
    installation.wait(lambda: trainer.status().get("interactions") == BURST, "taking everything")
    status: dict[str, Any] = trainer.status()
    thinned = status["lag"]["thinned"]
    assert thinned > 0
    assert status["supervised"] + status["first"] + status["out_of_reach"] + thinned == BURST
    assert status["fingerprint"] == str(installation.store.totals().fingerprint)
    assert trainer.metric("headrace_trainer_thinned_total") == thinned
    assert trainer.metric("headrace_trainer_interactions_total") == BURST - thinned
    assert trainer.metric("headrace_trainer_lag_seconds") >= 0
    assert "the stream outruns the trainer" in trainer.said()
    trainer.stop()
    verified = headrace(installation, "verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert f"learned from all but {thinned:,}" in verified.stdout
