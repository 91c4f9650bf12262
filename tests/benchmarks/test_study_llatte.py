"""The study of LLaTTE's two stages runs to its end, goes on where it was, and knows no future."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import study_llatte
from benchmarks.llatte_kept import STALE_S, Study, ratio_of
from benchmarks.llatte_streams import Histories, Stream, film_content, films, moods, pages
from benchmarks.study_llatte import fitted


def made(name: str) -> Stream:
    return moods(2_000) if name == "moods" else films(2_000)


@pytest.mark.parametrize("name", ["moods", "movietweetings"])
def test_histories_hold_what_had_happened_a_while_before(name: str) -> None:
    stream = made(name)
    histories, requests = Histories(stream), np.arange(made(name).num_requests // 2, made(name).num_requests)
    first = stream.offsets[requests]
    for stale_ms in (0, 3_600_000):
        places, offsets = histories.of(requests, max_len=11, stale_ms=stale_ms)
        row_of = np.repeat(first, np.diff(offsets))
        assert (stream.user[places] == stream.user[row_of]).all()
        assert (places < row_of).all()
        assert (stream.time_ms[places] < stream.time_ms[row_of] - stale_ms + (stale_ms == 0)).all()
        assert np.diff(offsets).max() == 11
        for index in range(0, len(requests), 37):  # the newest of what there is, in order
            row = int(first[index])
            earlier = np.flatnonzero(stream.user[:row] == stream.user[row])
            if stale_ms:
                earlier = earlier[stream.time_ms[earlier] < stream.time_ms[row] - stale_ms]
            assert np.array_equal(places[offsets[index] : offsets[index + 1]], earlier[-11:])
    assert np.array_equal(histories.lengths(11)[requests], np.diff(histories.of(requests, max_len=11)[1]))


def test_a_request_is_of_one_user_within_an_hour_and_a_page() -> None:
    user = np.array([1] * 10 + [2] * 3)
    time_ms = np.array([0] * 9 + [4_000_000] + [4_000_000, 4_000_001, 9_000_000])
    assert pages(user, time_ms).tolist() == [0] * 8 + [1, 2] + [3, 3, 4]


def test_the_beginning_of_a_stream_is_whole_requests() -> None:
    stream = moods(2_001)
    assert stream.offsets[-1] == len(stream.user) == 2_008
    assert stream.num_requests == 251


def test_films_of_the_same_kind_and_title_are_alike() -> None:
    lines = ["1::Alien (1979)::Horror|Sci-Fi", "2::Aliens (1986)::Action|Sci-Fi", "3::Emma (1996)::Comedy|Romance"]
    content = film_content(lines, np.array([1, 2, 3, 4]))
    assert content[0] @ content[1] > content[0] @ content[2]
    assert not content[3].any()


def test_an_item_is_new_until_it_has_ten_ratings(tmp_path: Path) -> None:
    study = Study("moods", argparse.Namespace(seeds=1, limit=2_000, data=tmp_path, work=tmp_path))
    items, is_new = study.stream(0).item, study.is_new(0)
    half = len(items) // 2
    assert 0 < is_new.sum() < len(is_new) == len(items) - half
    for place in range(0, len(is_new), 7):
        row = half + place
        assert is_new[place] == ((items[:row] == items[row]).sum() < 10)


def gain(*seeds: float, error: float = 0.1) -> dict[str, Any]:
    return {"gain_percent": float(np.mean(seeds)), "standard_error": error, "of_seeds": list(seeds)}


def test_there_is_no_ratio_to_a_gain_that_may_be_none() -> None:
    found = ratio_of(gain(0.5), gain(1.0, error=0.2))
    assert found is not None
    assert found["ratio"] == 0.5
    assert found["standard_error"] == pytest.approx(0.02**0.5)  # of both gains
    assert ratio_of(gain(0.5), gain(0.3, error=0.2)) is None
    assert ratio_of(gain(0.5), gain(-1.0)) is None


def test_gains_that_go_together_over_seeds_leave_a_ratio_sure() -> None:
    found = ratio_of(gain(0.4, 0.6), gain(0.8, 1.2))
    assert found is not None
    assert found["ratio"] == pytest.approx(0.5)
    assert found["standard_error"] == pytest.approx(0)


def test_a_line_through_points_on_a_line_explains_all_of_it() -> None:
    points = [{"flops": 10.0**n, "ne": 0.9 - 0.002 * n} for n in (3, 4, 5)]
    found = fitted(points)
    assert found["alpha"] == pytest.approx(0.2)
    assert found["r2"] == pytest.approx(1)


@pytest.mark.slow
def test_it_runs_to_its_end_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--streams", "moods", "movietweetings", "--work", str(tmp_path / "work")]
    said = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["study_llatte", *arguments, "--plots", str(tmp_path)])
        study_llatte.main()
        said.append(capsys.readouterr().out.splitlines())
        (tmp_path / "llatte.png").unlink()
    first, again = (json.loads(lines[-1]) for lines in said)
    assert first == again
    assert any("CPU s" in line for line in said[0])
    assert not any("CPU s" in line for line in said[1])
    for name, found in first["streams"].items():
        assert found["content"] is None
        assert (found["ideal"] is None) == (name != "moods")
        assert found["transfer"]["stale"].keys() == STALE_S.keys()
        assert len(found["transfer"]["upstream_large_over_small"]["of_seeds"]) == 2
        assert found["scaling"]["fits"].keys() == {"depth", "length", "width"}
        for fit in found["scaling"]["fits"].values():
            assert fit["alpha"] == pytest.approx(
                np.mean(fit["alpha_of_seeds"])
            )  # a line's slope is linear in its points
        assert len(found["scaling"]["arms"]["depth 4"]["over_smallest"]["of_seeds"]) == 2
        assert len(found["flops"]["one_stage"]["2x128"]["over_two_stages"]["of_seeds"]) == 2
        assert found["flops"]["two_stages"]["flops_of_100"] < found["flops"]["one_stage"]["2x128"]["flops_of_100"]
