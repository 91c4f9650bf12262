from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ops.demo.report import freshness_dict, relative, verdict, write_curves, write_summary
from ops.demo.state import Ages, Arm, Sample, WorkerFigures
from ops.demo.view import View, frame, plain_line, sparkline
from stream.freshness import HOPS


def _sample(at_s: float = 65.0, share: float = 0.5) -> Sample:
    return Sample(
        at_s=at_s,
        num_sent=int(1_000 * share) + 30,
        num_stored=int(1_000 * share) + 10,
        num_learned=int(1_000 * share),
        sent_per_s=710.0,
        stored_per_s=705.0,
        learned_per_s=700.0,
        event_time_ms=1_370_000_000_000,
        num_evaluated=int(20_000 * share),
        window=5_000,
        model=Arm(window=0.12 * share, lifetime=0.1 * share),
        popularity=Arm(window=0.1 * share, lifetime=0.09 * share),
        num_items=12_000,
        snapshot_version=42,
        snapshot_kind="delta",
        snapshot_bytes=412_345,
        publish_s=0.03,
        workers=tuple(WorkerFigures(version=42, swaps=41, pause_last_ms=0.4, pause_p99_ms=0.9) for _ in range(2)),
        freshness={
            hop: Ages(p50_ms=200.0 * place, p99_ms=900.0 * place, count=500) for place, hop in enumerate(HOPS, 1)
        },
        recent_f4=Ages(p50_ms=700.0, p99_ms=1_800.0, count=100),
        num_answered=321,
    )


def _shown(samples: list[Sample], width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(frame(samples, now="learning from the stream", num_events=1_000, span="1,000 ratings"))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_frame_shows_every_figure_that_the_demo_promises() -> None:
    shown = _shown([_sample()])
    for words in (
        "learning from the stream",
        "510  705/s",
        "lag 10",
        "0.0600",
        "0.0500",
        "+20%",
        "42  delta, 412 kB",
        "pause 0.4 ms, p99 0.9 ms",
        "F1 stored",
        "F4 answered with",
        "800 ms",
        "3.60 s",
        "321",
        "0 errors",
        "31 May 2013",
        "1:05",
    ):
        assert words in shown, words
    assert " ▸ learning from the stream" in [line.rstrip() for line in shown.splitlines()]


def test_the_frame_fits_a_small_terminal_and_an_empty_start() -> None:
    for samples in ([Sample(at_s=0.0)], [_sample()]):
        lines = _shown(samples, width=80).splitlines()
        assert len(lines) <= 23
        assert max(map(len, lines)) <= 80


def test_a_line_for_files_says_the_same_in_words() -> None:
    line = plain_line(_sample(), 1_000)
    assert line.startswith("[ 65 s]  50% learned, 700 events/s, lag 20 + 10")
    for words in ("model 0.0600", "popularity 0.0500", "42 delta 412 kB", "F4 p50 800 ms p99 3.60 s", "0 errors"):
        assert words in line
    assert "\n" not in line


def test_without_a_terminal_there_are_lines_and_no_control_characters() -> None:
    file = io.StringIO()
    with View(Console(file=file, width=120), num_events=1_000, span="") as view:
        view.say("starting")
        view.show(Sample(at_s=0.5))
        view.show(_sample())
        view.show(_sample(at_s=65.5))
    view.show(_sample(at_s=99.0))
    lines = file.getvalue().splitlines()
    assert [line.split("]")[0] for line in lines] == ["[  0 s", "[ 65 s"]
    assert "\x1b" not in file.getvalue()


def test_a_sparkline_ends_with_the_newest_value_and_leaves_the_unknown_blank() -> None:
    assert sparkline([None, 0.0, 0.5, 1.0], 1.0, 8) == " ▁▅█    "
    assert sparkline([0.0] * 99 + [1.0], 1.0, 4) == "▁▁▁█"
    assert sparkline([], 1.0, 3) == "   "


def test_the_verdict_is_honest_both_ways() -> None:
    won = verdict(Arm(window=0.12, lifetime=0.11), Arm(window=0.1, lifetime=0.1), 5_000)
    assert "beat decayed popularity over the whole stream: HR@10 0.1100 against 0.1000 (+10.0 %)" in won
    lost = verdict(Arm(window=0.08, lifetime=0.1), Arm(window=0.1, lifetime=0.1), 5_000)
    assert lost.count("did not beat") == 2
    assert "(-20.0 %)" in lost
    assert "too little" in verdict(Arm(), Arm(), 5_000)
    assert relative(0.1, 0.0) == "+0.1000"


def test_the_summary_is_whole_and_strict_json(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "summary.json", tmp_path / "b.json"]
    write_summary(paths, {"x": math.nan, "versions": {1: (1.5, math.inf)}, "path": tmp_path})
    for path in paths:
        assert json.loads(path.read_text()) == {"x": None, "versions": {"1": [1.5, None]}, "path": str(tmp_path)}
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["b.json", "summary.json"]


def test_coverage_is_the_share_of_events_that_reached_a_hop() -> None:
    shown = freshness_dict({"F4": Ages(p50_ms=1.0, p99_ms=2.0, count=75)}, 100)
    assert shown["F4"] == {"what": "answered with", "p50_ms": 1.0, "p99_ms": 2.0, "count": 75, "coverage": 0.75}
    assert freshness_dict({"F4": Ages()}, 0)["F4"]["coverage"] is None


def test_curves_are_drawn_even_of_a_run_without_figures(tmp_path: Path) -> None:
    full = [_sample(at_s=float(second), share=second / 60) for second in range(61)]
    gap = replace(full[5], model=Arm(), freshness={hop: Ages() for hop in HOPS})
    for name, samples in (("full", [*full, gap]), ("empty", [Sample(at_s=0.0)])):
        path = tmp_path / f"{name}.png"
        write_curves(path, samples, title=name)
        assert path.read_bytes().startswith(b"\x89PNG")
