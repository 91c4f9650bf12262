"""The gate: what is broken or worse than popularity is held back; a stream that turns harder for everybody is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.errors import SnapshotFormatError
from model.storage import open_storage
from online_trainer.config import TrainerConfig
from online_trainer.gate import HeldEpisode, PublishGate, read_held, write_held


def measured(model: float, popularity: float = 0.1, count: int = 1_000, **others: float) -> dict[str, float]:
    return {
        "model.window.count": count,
        "model.window.ndcg_at_20": model,
        "popularity.window.ndcg_at_20": popularity,
        **others,
    }


def gate(**settings: Any) -> PublishGate:
    return PublishGate(TrainerConfig(**settings))


def reason(gate: PublishGate, metrics: dict[str, float], *, now_ms: int = 0, finite: bool = True) -> str | None:
    held = gate.judge(metrics, weights_are_finite=finite, now_ms=now_ms)
    return None if held is None else held.reason


def test_weights_and_metrics_that_are_not_finite_are_held_back() -> None:
    assert reason(gate(), measured(0.2), finite=False) == "weights"
    assert reason(gate(), measured(0.2) | {"model.lifetime.mrr": float("nan")}) == "metrics"
    assert reason(gate(), {}) is None


def test_by_default_half_of_popularity_on_the_same_events_is_demanded() -> None:
    assert reason(gate(), measured(0.051)) is None
    assert reason(gate(), measured(0.049)) == "baseline"
    held = gate().judge(measured(0.049), weights_are_finite=True, now_ms=0)
    assert held is not None
    assert held.sentence == "windowed ndcg_at_20 is 0.0490, below 0.5 times popularity's 0.1000"
    assert held.evidence == {"value": 0.049, "baseline": 0.1, "gate_baseline_min": 0.5}
    # Harder for everybody: the level of the stream is no reason.
    assert reason(gate(), measured(0.0049, popularity=0.009)) is None


def test_nothing_is_judged_before_enough_was_evaluated() -> None:
    assert reason(gate(), measured(0.0, count=999)) is None
    assert reason(gate(metrics_window=100), measured(0.0, count=99)) is None
    assert reason(gate(metrics_window=100), measured(0.0, count=100)) == "baseline"
    assert reason(gate(gate_baseline_min=0), measured(0.0)) is None


def test_a_drop_against_the_best_of_late_is_held_back_until_that_is_old() -> None:
    strict = gate(gate_drop_max=0.2, gate_memory_s=10)
    assert reason(strict, measured(0.2)) is None
    strict.published(measured(0.2), 0)
    strict.published(measured(0.3), 1_000)
    strict.published(measured(0.25), 2_000)
    assert reason(strict, measured(0.241), now_ms=3_000) is None
    assert reason(strict, measured(0.239), now_ms=3_000) == "drop"
    assert reason(strict, measured(0.239), now_ms=11_000) == "drop"
    assert reason(strict, measured(0.239), now_ms=11_001) is None
    assert reason(gate(), measured(0.239), now_ms=3_000) is None


def test_what_is_judged_can_be_another_metric() -> None:
    by_hits = gate(gate_metric="hr_at_10")
    metrics = measured(0.2) | {"model.window.hr_at_10": 0.01, "popularity.window.hr_at_10": 0.1}
    assert reason(by_hits, metrics) == "baseline"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gate_drop_max": 1.0}, "gate_drop_max = 1.0"),
        ({"gate_baseline_min": -0.1}, "must not be negative"),
        ({"gate_memory_s": 0}, "must be positive"),
        ({"gate_min_evaluated": 0}, "must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrainerConfig(**settings)


def test_what_was_held_back_is_written_and_read_and_does_not_grow(tmp_path: Path) -> None:
    assert read_held(tmp_path, "default") == []
    episodes = [
        HeldEpisode(
            since_ms=number,
            last_ms=number + 1,
            num_attempts=3,
            version=number,
            num_interactions=10,
            reason="drop",
            sentence="why",
            evidence={"value": 0.1},
            ended_by=number + 1,
        )
        for number in range(30)
    ]
    write_held(tmp_path, "default", episodes)
    assert read_held(tmp_path, "default") == episodes[-20:]
    in_words = open_storage(tmp_path).read("default/held.json", size_max=1 << 20).replace(b": 3,", b': "3",')
    for content in (b"{}", b"[]", b"[" * 100_000, in_words):
        open_storage(tmp_path).publish("default/held.json", content)
        with pytest.raises(SnapshotFormatError, match="delete it"):
            read_held(tmp_path, "default")
