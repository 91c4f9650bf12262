"""Signals, decisions, and what is in force because of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.softmax_loss import LogitSummary
from online_trainer.drift import DriftDecision, DriftMonitor, Signals, signals_of
from online_trainer.drift_config import DriftConfig

NOTHING = DriftConfig(
    adwin_loss=(), adwin_calibration=(), page_hinkley_loss=(), page_hinkley_calibration=(), warm_up_interactions=100
)
ALL = replace(NOTHING, page_hinkley_loss=("boost", "rehearse", "replay", "hold", "alert"))
CHANGE = 1_000


def losses(num: int = 3_000, change: int = CHANGE) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    return np.where(np.arange(num) < change, 0.6, 1.0) + rng.normal(0, 0.1, num)


def observe(
    monitor: DriftMonitor,
    loss: NDArray[np.float64],
    calibration: NDArray[np.float64] | None = None,
    step_size: int = 50,
) -> list[DriftDecision]:
    """A step each `step_size` interactions, a second of event time apart."""
    made = []
    signals = {"loss": loss, "calibration": np.zeros_like(loss) if calibration is None else calibration}
    for first in range(0, len(loss), step_size):
        of_step = {name: values[first : first + step_size] for name, values in signals.items()}
        step = (monitor.num_tested + step_size) // step_size
        made += monitor.observe(of_step, step=step, event_time_ms=step * 1_000)
    return made


def signals(logits: torch.Tensor, target_rows: torch.Tensor) -> Signals:
    return signals_of(LogitSummary.of(logits, target_rows), num_items=logits.shape[1])


def test_signals_of_known_logits() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    found = signals(logits, torch.tensor([1, 2]))
    p = torch.softmax(logits, 1).double().numpy()
    np.testing.assert_allclose(found["loss"], -np.log(p[[0, 1], [1, 2]]) / np.log(3), rtol=1e-6)
    assert found["loss"][1] == pytest.approx(1.0)
    np.testing.assert_allclose(found["calibration"], [p[0, 0], 1 / 3 - 1], rtol=1e-6)


def test_a_calibrated_model_has_a_calibration_of_nothing_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 8, generator=generator)
    drawn = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)[:, 0]
    assert abs(float(signals(logits, drawn)["calibration"].mean())) < 0.01
    too_sure = signals(3 * logits, drawn)["calibration"]
    assert float(too_sure.mean()) > 0.1


def test_a_rise_leads_to_one_decision_with_its_evidence() -> None:
    monitor = DriftMonitor(replace(ALL, page_hinkley_loss=("alert",)))
    (decision,) = observe(monitor, losses())
    assert (decision.detector, decision.signal, decision.reactions) == ("page_hinkley", "loss", ("alert",))
    assert CHANGE < decision.num_tested < CHANGE + 150
    assert decision.mean_before == pytest.approx(0.6, abs=0.02)
    assert decision.mean_after == pytest.approx(1.0, abs=0.05)
    assert abs(decision.num_before - CHANGE) < 20
    assert decision.step == -(-decision.num_tested // 50)
    assert decision.event_time_ms == decision.step * 1_000
    assert "page_hinkley on loss" in decision.sentence()
    assert f"event time {decision.event_time_ms} ms" in decision.sentence()
    assert decision.without_time() == decision.sentence().removeprefix("drift: ").replace(
        f"; step {decision.step}, event time {decision.event_time_ms} ms", ""
    )


def test_each_detector_has_its_own_reactions() -> None:
    config = replace(NOTHING, adwin_calibration=("replay",), page_hinkley_loss=("boost",))
    calibration = np.where(np.arange(3_000) < 2_000, 0.0, 0.4)
    made = observe(DriftMonitor(config), losses(), calibration + np.random.default_rng(1).normal(0, 0.1, 3_000))
    assert [(d.detector, d.signal, d.reactions) for d in made] == [
        ("page_hinkley", "loss", ("boost",)),
        ("adwin", "calibration", ("replay",)),
    ]


def test_a_fall_is_no_drift() -> None:
    config = replace(NOTHING, adwin_loss=("alert",), page_hinkley_loss=("alert",))
    assert not observe(DriftMonitor(config), losses()[::-1].copy()[: 3_000 - CHANGE // 2])


def test_before_the_warm_up_is_over_nothing_is_decided() -> None:
    assert not observe(DriftMonitor(replace(ALL, warm_up_interactions=1_500)), losses(1_400))


@pytest.mark.parametrize("cool_down", ["exponential", "linear"])
def test_a_boost_cools_down(cool_down: Any) -> None:
    config = replace(
        ALL,
        page_hinkley_loss=("boost",),
        boost_cool_down=cool_down,
        boost_row_factor=9.0,
        boost_dense_factor=4.0,
        boost_interactions=400,
    )
    monitor = DriftMonitor(config)
    loss = losses()
    assert monitor.learning_rate_factors == (1.0, 1.0)
    (decision,) = observe(monitor, loss[: CHANGE + 100])
    factors = []
    for _ in range(500):
        factors.append(monitor.learning_rate_factors)
        observe(monitor, np.full(1, 0.9), step_size=1)
    elapsed = CHANGE + 100 - decision.num_tested
    rows, dense = (np.array(factors)[:, n] for n in (0, 1))
    halfway = 200 - elapsed
    expected = (3.0, 2.0) if cool_down == "exponential" else (5.0, 2.5)
    assert (rows[halfway], dense[halfway]) == pytest.approx(expected)
    assert (np.diff(rows[: 400 - elapsed]) < 0).all()
    assert (rows[400 - elapsed :] == 1.0).all()
    assert (dense[400 - elapsed :] == 1.0).all()


def test_what_is_in_force_is_not_begun_again() -> None:
    monitor = DriftMonitor(replace(ALL, replay_interactions=100_000, page_hinkley_loss=("replay",)))
    again = np.concatenate([losses(), losses() + 1.0])
    made = observe(monitor, again)
    assert [decision.reactions for decision in made[:1]] == [("replay",)]
    assert len(made) >= 2
    assert all(decision.reactions == () for decision in made[1:])
    assert "in force" in made[1].sentence()


def test_replay_share_and_rehearsal_end() -> None:
    config = replace(
        ALL,
        page_hinkley_loss=("replay", "rehearse"),
        replay_interactions=200,
        rehearse_interactions=300,
        replay_share=0.25,
    )
    monitor = DriftMonitor(config)
    assert (monitor.replay_share, monitor.rehearse_since_ms) == (None, None)
    (decision,) = observe(monitor, losses(CHANGE + 100))
    assert (monitor.replay_share, monitor.rehearse_since_ms) == (0.25, decision.event_time_ms)
    observe(monitor, np.full(200, 0.9))
    assert (monitor.replay_share, monitor.rehearse_since_ms) == (None, decision.event_time_ms)
    observe(monitor, np.full(100, 0.9))
    assert monitor.rehearse_since_ms is None


def test_publishing_is_held_until_the_loss_is_back() -> None:
    monitor = DriftMonitor(replace(ALL, page_hinkley_loss=("hold",), hold_max_s=1e6))
    observe(monitor, losses(CHANGE + 100))
    assert monitor.holds_publishing
    observe(monitor, np.full(500, 0.95))
    assert monitor.holds_publishing
    observe(monitor, np.full(500, 0.6))
    assert not monitor.holds_publishing


def test_publishing_is_held_no_longer_than_configured() -> None:
    monitor = DriftMonitor(replace(ALL, page_hinkley_loss=("hold",), hold_max_s=5.0))
    observe(monitor, losses(CHANGE + 100))
    assert monitor.holds_publishing
    observe(monitor, np.full(300, 1.0))
    assert not monitor.holds_publishing


@pytest.mark.parametrize("stop", [500, 1_000, 1_050, 1_100, 2_000])
def test_a_monitor_continues_from_json_bit_by_bit(stop: int) -> None:
    config = replace(ALL, adwin_loss=("alert",), adwin_calibration=("alert",), hold_max_s=20.0, decisions_kept=2)
    loss = np.concatenate([losses(), losses()])
    calibration = loss - 0.6
    unbroken, first, continued = (DriftMonitor(config) for _ in range(3))
    observe(unbroken, loss[:stop], calibration[:stop])
    observe(first, loss[:stop], calibration[:stop])
    continued.load_state(json.loads(json.dumps(first.state())))
    assert continued.summary() == unbroken.summary()
    for start in range(stop, len(loss), 50):
        part = slice(start, start + 50)
        assert observe(unbroken, loss[part], calibration[part]) == observe(continued, loss[part], calibration[part])
        assert unbroken.learning_rate_factors == continued.learning_rate_factors
        assert unbroken.state() == continued.state()
    assert unbroken.num_decisions > 2
    assert len(unbroken.decisions) == 2


def test_what_was_in_force_ends_with_the_detectors() -> None:
    before, after = DriftMonitor(ALL), DriftMonitor(NOTHING)
    observe(before, losses()[: CHANGE + 50])
    assert before.holds_publishing
    after.load_state(json.loads(json.dumps(before.state())))
    assert not after.holds_publishing
    assert (after.learning_rate_factors, after.rehearse_since_ms, after.replay_share) == ((1.0, 1.0), None, None)


def test_without_detectors_nothing_is_watched() -> None:
    monitor = DriftMonitor(NOTHING)
    assert not monitor.is_on
    assert not observe(monitor, losses())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adwin_loss", ("panic",)),
        ("boost_cool_down", "sudden"),
        ("boost_row_factor", 0.5),
        ("page_hinkley_threshold", 0.0),
        ("replay_share", 1.0),
    ],
)
def test_settings_that_cannot_be_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"drift.{field}"):
        DriftConfig(**{field: value})  # type: ignore[arg-type]
