"""The study of ULTRA-HSTU runs, goes on where it was, and fits what it should."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from benchmarks import study_ultra
from benchmarks.study_stream import Account, Arm, Stream, liked, long_range, ml_1m, run_arm
from benchmarks.whole_filter import SeenInStream
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
    found = study_ultra.fitted(rows, "training_flops")
    assert found["slope_per_mflop"] == pytest.approx(0.02)
    assert found["r2"] == pytest.approx(1)
    assert found["slope_error"] == pytest.approx(0, abs=1e-9)


def grid_row(family: str, size: str, quality: float, million: float, **model: int) -> dict[str, Any]:
    name = f"{family}-{size}" + (f" seed {model['seed']}" if model else "")
    flops = {"training_flops": 1e6 * million, "inference_flops": 2e6 * million}
    return {
        "stream": "x",
        "group": "grid",
        "family": family,
        "name": name,
        "model": model,
        "ndcg_at_20": quality,
        **flops,
    }


def test_slopes_are_told_by_seed_with_the_points_that_a_seed_has() -> None:
    rows = [grid_row("hstu", size, 0.1 * n, n) for n, size in enumerate(("1x1", "2x1", "3x1"), 1)]
    rows += [grid_row("ultra", size, 0.2 * n, n) for n, size in enumerate(("1x1", "2x1", "3x1"), 1)]
    rows += [grid_row("ultra", "3x1", 1.0, 3, seed=1)]
    found = study_ultra.summary(rows)["x"]
    assert found["seeds"] == {"ultra-3x1": [pytest.approx(0.6), 1.0]}
    assert found["fits"]["training"]["slope_per_mflop_ratio"] == pytest.approx(2)
    assert [one["slope_per_mflop_ratio"] for one in found["fits"]["training"]["of_seeds"]] == pytest.approx([2, 4])
    assert found["fits"]["inference"]["of_seeds"][1]["ultra"]["slope_per_mflop"] == pytest.approx(0.2)


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


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder as that of MovieLens-1M: three users who rate other films each time, some in one second."""
    made = np.random.default_rng(0)
    user = np.repeat([7, 8, 9], 90)
    frame = {
        "user_id": user,
        "item_id": np.concatenate([made.permutation(120)[:90] for _ in range(3)]),
        "rating": made.integers(1, 6, 270),
        "timestamp": 1_000 + np.tile(np.arange(90) // 2, 3),
        "seq_pos": np.tile(np.arange(90), 3),
    }
    frame["seq_pos"][5] = -1
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    pl.DataFrame(frame).write_parquet(folder / "interactions.parquet")
    return folder


def test_ratings_of_movielens_come_by_time_and_in_the_order_of_the_file_within_a_second(films: Path) -> None:
    stream = ml_1m(200, films).interactions
    assert len(stream) == 200
    assert ml_1m(200, films).batch_interactions <= min(study_ultra.LENGTHS["ml_1m"])
    written = pl.read_parquet(films / "interactions.parquet").filter(pl.col("seq_pos") >= 0)
    assert (np.diff(stream.event_time_ms) >= 0).all()
    for user in (7, 8, 9):
        own = stream.item_id[stream.user_id == user]
        assert own.tolist() == written.filter(pl.col("user_id") == user)["item_id"].to_list()[: len(own)]
    assert (np.diff(stream.event_key.astype(np.int64)) > 0).all()


def test_no_ratio_is_told_of_lines_that_do_not_rise() -> None:
    rising = [grid_row("ultra", f"{n}x1", 0.2 * n, n) for n in (1, 2, 3)]
    rows = [grid_row("hstu", f"{n}x1", quality, n) for n, quality in ((1, 0.3), (2, 0.1), (3, 0.32))]
    assert study_ultra.summary(rows + rising)["x"]["fits"]["training"]["slope_per_mflop_ratio"] is None
    falling = [grid_row("ultra", f"{n}x1", -0.2 * n, n) for n in (1, 2, 3)]
    rows = [grid_row("hstu", f"{n}x1", -0.1 * n, n) for n in (1, 2, 3)]
    assert study_ultra.summary(rows + falling)["x"]["fits"]["inference"]["exponent_ratio"] is None


def test_what_a_user_has_had_is_left_out_however_little_is_read(films: Path) -> None:
    """Popularity, which reads no history, then ranks alike for every length, and as where all is read."""
    stream = replace(ml_1m(240, films), batch_interactions=8)  # or a step brings more of a user than is read
    own: Stream = replace(stream, filters_all=False)
    arms = [
        Arm(stream="ml_1m", group="grid", family="ultra", name="a", model=study_ultra.ultra(1, max_len))
        for max_len in (8, 128)
    ]
    short, long = (run_arm(arm, stream) for arm in arms)
    own_short, own_long = (run_arm(arm, own)["popularity_hr_at_10"] for arm in arms)
    assert short["steps"] == long["steps"]
    assert own_short < short["popularity_hr_at_10"] == long["popularity_hr_at_10"] == own_long


def test_items_before_an_event_are_those_of_its_user() -> None:
    stream = long_range(50).interactions
    items, offsets = SeenInStream(stream).before(np.array([49, 0, 30]))
    for place, event in enumerate((49, 0, 30)):
        is_before = (stream.user_id == stream.user_id[event]) & (np.arange(50) < event)
        assert items[offsets[place] : offsets[place + 1]].tolist() == stream.item_id[is_before].tolist()


def test_a_stream_without_its_data_is_refused_in_a_sentence_and_left_out_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study_ultra", "--quick", "--streams", "ml_1m", "--data", str(tmp_path), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        study_ultra.main()
    assert "has no interactions.parquet, which the stream ml_1m reads: see --data" in capsys.readouterr().err


def test_a_model_that_ran_under_another_name_is_not_run_again_and_uncommitted_ones_are_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def quickly(arm: Arm, _stream: Stream) -> dict[str, Any]:
        ran.append(arm.name)
        named = {"stream": arm.stream, "group": arm.group, "family": arm.family, "name": arm.name}
        means = {
            "ndcg_at_20": 0.1,
            "hr_at_10": 0.1,
            "training_flops": 1e6 * len(ran),
            "inference_flops": 1e6 * len(ran),
        }
        return {**named, "model": arm.model, "loss": arm.loss, **means, "cpu_s": 0.0}

    monkeypatch.setattr(study_ultra, "run_arm", quickly)
    words = ["study_ultra", "--streams", "long_range", "--events", "400", "--results", str(tmp_path)]
    for commit, more in (("a-dirty", []), ("b", []), ("b", ["--again-dirty"])):
        monkeypatch.setattr(study_ultra, "environment", lambda commit=commit: {"commit": commit})
        monkeypatch.setattr(sys, "argv", [*words, *more])
        study_ultra.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(ran) == 2 * len(set(ran))
    assert "ultra" not in ran  # of the ablation: the grid's ultra-2x256
    assert told["arms_by_commit"] == {"b": len(set(ran)) + 1}
    del ran[:]
    monkeypatch.setattr(sys, "argv", [*words, "--events", "500", "--arms", "ultra-1x32", "K2 = 0"])
    study_ultra.main()
    assert ran == ["ultra-1x32", "K2 = 0"]
    monkeypatch.setattr(sys, "argv", [*words, "--events", "500", "--kept"])
    study_ultra.main()
    assert ran == ["ultra-1x32", "K2 = 0"]
