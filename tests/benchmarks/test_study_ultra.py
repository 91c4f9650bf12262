"""The study of ULTRA-HSTU runs, goes on where it was, and fits what it should."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import study_ultra
from benchmarks.study_stream import Account, Arm, liked, long_range, run_arm
from model.config import LossConfig, ModelConfig
from model.flops import forward_flops, segments_of


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    words = ["study_ultra", "--quick", "--streams", "long_range", "--events", "400", "--results", str(folder)]
    monkeypatch.setattr(sys, "argv", words)
    study_ultra.main()
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def test_a_quick_study_writes_arms_fits_and_a_picture_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(tmp_path, monkeypatch, capsys)
    assert (tmp_path / "study-ultra.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "study-ultra.json").read_text())
    assert len(written["arms"]) == 6
    assert all(arm["training_flops"] > 0 and arm["count"] > 0 for arm in written["arms"])
    of_stream = first["summary"]["long_range"]
    assert of_stream["fits"].keys() == {"training", "inference"}
    assert of_stream["ablation"]["ultra"]["ndcg_at_20"] == 0

    def never(*_given: object) -> None:
        raise AssertionError("an arm was run again")

    monkeypatch.setattr(study_ultra, "run_arm", never)
    assert run(tmp_path, monkeypatch, capsys)["summary"] == first["summary"]


def test_a_line_through_points_on_it_has_its_slope_and_exponent() -> None:
    rows = [{"training_flops": x * 1e6, "ndcg_at_20": 0.1 * x**0.5} for x in (1.0, 4.0, 16.0)]
    assert study_ultra.fitted(rows, "training_flops")["exponent"] == pytest.approx(0.5)
    rows = [{"training_flops": x * 1e6, "ndcg_at_20": 0.1 + 0.02 * x} for x in (1.0, 4.0, 16.0)]
    assert study_ultra.fitted(rows, "training_flops")["slope_per_mflop"] == pytest.approx(0.02)


@pytest.mark.parametrize("stream", study_ultra.LENGTHS)
def test_every_arm_is_a_model_and_ultra_takes_less_than_hstu_of_its_size(stream: str) -> None:
    arms = study_ultra.arms_of(stream)
    assert len({arm.key for arm in arms}) == len(arms)
    length = torch.tensor([study_ultra.LONGEST[stream]])
    for max_len in study_ultra.LENGTHS[stream]:
        for num_layers in study_ultra.LAYERS[stream]:
            own = [
                float(forward_flops(segments_of(ModelConfig(**one)), length.clamp(max=max_len)))
                for one in (study_ultra.ultra(num_layers, max_len), study_ultra.hstu(num_layers, max_len))
            ]
            assert own[0] < own[1] / 2
    for arm in arms:
        ModelConfig(**arm.model)
        LossConfig(**arm.loss)


def test_far_events_are_those_of_the_stream() -> None:
    stream = long_range(2_000)
    assert stream.is_far is not None
    assert 0.1 < stream.is_far[1_500:].mean() < 0.35
    assert np.isclose(stream.ideal["far_hr_at_10"], 1, atol=0.1)


def test_ratings_of_8_and_more_are_liked_and_operations_of_a_mixture_are_counted() -> None:
    """By two transducers that read all of a history: as many as of two encoders and the product that fuses them."""
    stream = liked(3_000)
    assert stream.actions == ("rated", "liked")
    actions = stream.interactions.action
    assert set(actions) == {1, 2}
    assert (stream.interactions.value[actions == 2] >= 8).all()
    both = {"name": "all", "actions": ["rated", "liked"], "max_len": 16}
    base = study_ultra.ultra(1, 16)
    arms = [
        Arm(stream="liked", group="ablation", family="ultra", name=name, model={**base, **changed})
        for name, changed in (("one", {}), ("two", {"transducers": [both, {**both, "name": "again"}]}))
    ]
    one, two = (run_arm(arm, stream) for arm in arms)
    assert one["count"] == two["count"]
    fused = 2 * 2 * 32**2
    positions = two["inference_flops"] - 2 * one["inference_flops"]
    assert 0 < positions / fused <= 16
    # Transducers read in hops, an encoder exactly the newest.
    assert two["training_flops"] < 2.1 * one["training_flops"] + 3 * fused * 16


def test_shortened_histories_take_fewer_operations_in_training_and_as_many_in_inference() -> None:
    stream = long_range(1_200)
    arms = [
        Arm(stream="x", group="ablation", family="ultra", name=name, model=study_ultra.ultra(1, 48), loss=loss)
        for name, loss in (("whole", {}), ("shortened", study_ultra.SHORTENED))
    ]
    whole, short = (run_arm(arm, stream) for arm in arms)
    assert short["inference_flops"] == whole["inference_flops"]
    assert short["training_flops"] < 0.95 * whole["training_flops"]
    assert Account(config=ModelConfig()).num == 0
