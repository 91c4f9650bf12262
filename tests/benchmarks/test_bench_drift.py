"""What the drift benchmark counts as detection and recovery."""

from __future__ import annotations

import numpy as np
import pytest

from backtest.simulator import Change, SimulatorConfig, simulate
from benchmarks.bench_drift import ALERT, Run, alarms, learn, recovery
from online_trainer.config import TrainerConfig
from online_trainer.drift import DriftDecision


def decision(step: int, detector: str = "adwin") -> DriftDecision:
    return DriftDecision(
        detector=detector,
        signal="loss",
        reactions=(),
        mean_before=1.0,
        mean_after=2.0,
        num_before=1,
        num_after=1,
        step=step,
        num_tested=step * 100,
        event_time_ms=0,
    )


def run_of(quality: list[float]) -> Run:
    """Steps of 100 events, all tested."""
    steps = len(quality)
    return Run(
        end=100 * np.arange(1, steps + 1),
        tested=np.full(steps, 100),
        ndcg=np.array(quality),
        ideal=np.ones(steps),
        decisions=[decision(30), decision(62), decision(63), decision(64, "page_hinkley")],
        cpu_s=0.0,
    )


SUDDEN = Change(kind="sudden", first=6_000, last=6_000, first_ms=0)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([0.1] * 20 + [0.5] * 40, 1_900),  # 1,024 tested take 11 steps: nine tenths of .5 are reached from step 19 on
        ([0.5] * 60, 0),
        ([0.1] * 60, None),
    ],
)
def test_recovery_is_the_way_from_the_change_to_the_first_good_window(after: list[float], expected: int | None) -> None:
    assert recovery(run_of([0.5] * 60 + after), SUDDEN, 12_000, 0.9) == expected


def test_a_dip_that_begins_late_is_not_over_before_it_has_begun() -> None:
    quality = [0.5] * 80 + [0.1] * 10 + [0.5] * 30
    assert recovery(run_of(quality), SUDDEN, 12_000, 0.9) == 2_900


def test_recovery_from_a_gradual_change_counts_from_its_end() -> None:
    gradual = Change(kind="gradual", first=6_000, last=8_000, first_ms=0)
    assert recovery(run_of([0.5] * 60 + [0.1] * 30 + [0.5] * 30), gradual, 12_000, 0.9) == 900


def test_the_first_alarm_of_each_detector_after_the_change_counts() -> None:
    assert alarms(run_of([0.5] * 120), 6_000, 12_000) == {"adwin_loss": 200, "page_hinkley_loss": 400}


def test_the_learner_is_driven_over_every_event_of_the_stream() -> None:
    stream = simulate(
        SimulatorConfig(num_events=600, num_items=60, num_groups=2, interactions_per_user=10, num_users=20)
    )
    run = learn(stream, ALERT, TrainerConfig(num_threads=1))
    assert run.end[-1] == 600
    first = len(np.unique(stream.user_id))
    assert run.tested.sum() == 600 - first
    assert run.ideal.sum() == pytest.approx(np.nansum(stream.ideal_ndcg_at_20))
    assert 0 < run.ndcg.sum() < run.ideal.sum()
