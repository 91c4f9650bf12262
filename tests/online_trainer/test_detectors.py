"""The detectors are river's: the same alarms at the same values, continued bit by bit from plain JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from river.drift import ADWIN, PageHinkley

from online_trainer.detectors import build_detector
from online_trainer.drift_config import DETECTORS, DriftConfig

CONFIG = DriftConfig(adwin_delta=0.002, page_hinkley_delta=0.01, page_hinkley_threshold=8.0)


def rising(num: int = 4_000, seed: int = 0) -> NDArray[np.float64]:
    """A mean of 0.5 that rises to 0.8 and, later, to 1.2."""
    rng = np.random.default_rng(seed)
    means = np.select([np.arange(num) < num // 2, np.arange(num) < 3 * num // 4], [0.5, 0.8], 1.2)
    return means + rng.normal(0, 0.2, num)


@pytest.mark.parametrize("seed", range(3))
def test_adwin_gives_rivers_alarms_of_rises(seed: int) -> None:
    values = np.concatenate([rising(seed=seed), rising(seed=seed + 9)[::-1]])
    theirs = ADWIN(delta=CONFIG.adwin_delta)  # type: ignore[no-untyped-call]
    ours = build_detector("adwin", CONFIG)
    expected, found, falls = [], [], 0
    for at, value in enumerate(values.tolist()):
        before = theirs.estimation
        theirs.update(value)  # type: ignore[no-untyped-call]
        if theirs.drift_detected:
            if theirs.estimation > before:
                expected.append(at)
            else:
                falls += 1
        if ours.update(value):
            found.append(at)
    assert found == expected
    assert len(found) >= 2
    assert falls >= 1


@pytest.mark.parametrize("seed", range(3))
def test_page_hinkley_gives_rivers_alarms(seed: int) -> None:
    theirs = PageHinkley(delta=0.01, threshold=8.0, alpha=1.0, mode="up")
    ours = build_detector("page_hinkley", CONFIG)
    expected, found = [], []
    for at, value in enumerate(rising(seed=seed).tolist()):
        theirs.update(value)  # type: ignore[no-untyped-call]
        expected += [at] * theirs.drift_detected
        found += [at] * (ours.update(value) is not None)
    assert found == expected
    assert len(found) >= 2


@pytest.mark.parametrize("name", DETECTORS)
def test_the_evidence_is_the_mean_before_and_after_the_rise(name: str) -> None:
    detector = build_detector(name, CONFIG)
    values = rising()
    at, rise = next((at, found) for at, value in enumerate(values.tolist()) if (found := detector.update(value)))
    assert 2_000 <= at < 2_100
    assert rise.mean_before == pytest.approx(0.5, abs=0.03)
    assert rise.num_before + rise.num_after == at + 1
    assert rise.mean_before == pytest.approx(values[: rise.num_before].mean())
    assert rise.mean_after == pytest.approx(values[rise.num_before : at + 1].mean())
    if name == "page_hinkley":  # ADWIN does not look for the place
        assert abs(rise.num_before - 2_000) < 20


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("stop", [0, 1, 31, 1_999, 2_060, 3_010])
def test_a_detector_continues_from_json_bit_by_bit(name: str, stop: int) -> None:
    unbroken, first = build_detector(name, CONFIG), build_detector(name, CONFIG)
    values = rising().tolist()
    for value in values[:stop]:
        unbroken.update(value)
        first.update(value)
    continued = build_detector(name, CONFIG)
    continued.load_state(json.loads(json.dumps(first.state())))
    assert [unbroken.update(value) for value in values[stop:]] == [continued.update(value) for value in values[stop:]]
    assert unbroken.state() == continued.state()


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_stopped_at_its_alarm_continues_bit_by_bit(name: str) -> None:
    unbroken = build_detector(name, CONFIG)
    values = rising().tolist()
    at = next(at for at, value in enumerate(values) if unbroken.update(value))
    continued = build_detector(name, CONFIG)
    continued.load_state(json.loads(json.dumps(unbroken.state())))
    for value in values[at + 1 :]:
        assert unbroken.update(value) == continued.update(value)
    assert unbroken.state() == continued.state()


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("what", ["river", "delta"])
def test_a_state_of_other_settings_or_another_river_is_left_and_said(
    name: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = build_detector(name, CONFIG), build_detector(name, CONFIG)
    for value in rising().tolist():
        old.update(value)
    fresh = new.state()
    new.load_state(old.state() | {what: "0.0"})
    assert new.state() == fresh
    assert f"another {what}" in caplog.text


def test_without_a_detector_river_is_not_imported() -> None:
    program = (
        "import sys;from online_trainer.drift import DriftMonitor;from online_trainer.drift_config import DriftConfig;"
        "DriftMonitor(DriftConfig(adwin_loss=(), adwin_calibration=(), page_hinkley_loss=()));"
        "sys.exit('river' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
