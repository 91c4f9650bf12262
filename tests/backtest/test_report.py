"""A report is one page that needs nothing else, says what the figures say, and can be read by eye, ear and program."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backtest.bootstrap import BootstrapConfig
from backtest.evaluation import EvaluationConfig
from backtest.report import ReportFiles, write_report
from backtest.report_svg import Mark, Series, line_chart, nice_ticks, time_ticks
from backtest.run_files import ArmInfo, RunFolder, RunManifest, RunWriter
from tests.backtest.made_run import T0, arms, make_run

QUICK = EvaluationConfig(bootstrap=BootstrapConfig(num_resamples=200))
_VOID = {"meta", "br"}


class _Page(HTMLParser):
    """Checks that elements are closed in order, and collects what tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    root = tmp_path_factory.mktemp("run")
    return write_report(make_run(root), root / "report", QUICK)


def test_the_page_is_whole_html_and_fetches_nothing(files: ReportFiles) -> None:
    page = _read(files.html)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "embed"}
    assert not [attributes for _, attributes in page.elements if {"src", "href", "xlink:href"} & set(attributes)]
    assert not re.search(r"url\(|@import|https?:", files.html.read_text(encoding="utf-8"))


def test_what_names_say_is_shown_and_never_interpreted(files: ReportFiles) -> None:
    raw, page = files.html.read_text(encoding="utf-8"), _read(files.html)
    assert "made-up <news>" in "".join(page.text)
    assert "the loss rose: page_hinkley <b>alarm</b>" in "".join(page.text)
    assert "<news>" not in raw
    assert "<b>" not in raw


def test_every_chart_has_a_name_and_every_table_heads(files: ReportFiles) -> None:
    page = _read(files.html)
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(charts) > 3
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    heads = [attributes for tag, attributes in page.elements if tag == "th"]
    assert heads
    assert {head.get("scope") for head in heads} == {"row", "col"}
    assert ("html", {"lang": "en"}) in page.elements


def test_page_json_and_parquet_say_the_same(files: ReportFiles) -> None:
    report = json.loads(files.json.read_text(encoding="utf-8"))
    table = pl.read_parquet(files.arms)
    text = "".join(_read(files.html).text)
    assert [arm["info"]["name"] for arm in report["arms"]] == [arm.name for arm in arms()]
    for arm in report["arms"]:
        found = arm["metrics"]["all"]["ndcg_at_20"]
        row = table.row(
            by_predicate=(pl.col("arm") == arm["info"]["name"])
            & (pl.col("group") == "all")
            & (pl.col("metric") == "ndcg_at_20"),
            named=True,
        )
        assert (row["mean"], row["low"], row["high"]) == (found["mean"], found["low"], found["high"])
        assert f"{found['mean']:.4f}" in text
    assert [sentence for sentence in report["findings"] if sentence in text] == report["findings"]
    assert report["run"]["lineage"]["source"]["sha256"] in text
    assert report["run"]["config"]["trainer"]["batch_tokens"] == 2048
    assert "batch_tokens" in text
    assert pl.read_parquet(files.curves)["arm"].n_unique() == len(arms())


def test_findings_say_who_is_ahead_and_where_freshness_pays(files: ReportFiles) -> None:
    first, *others = json.loads(files.json.read_text(encoding="utf-8"))["findings"]
    assert first.startswith("Online, published every batch reaches NDCG@20 0.")
    assert [sentence.split(" (")[0] for sentence in others[:3]] == [
        "It is ahead of Retrained every 1d on 30d",
        "It is ahead of Last-item co-occurrence",
        "It is ahead of Decayed popularity",
    ]
    assert re.match(r"Publishing less often costs NDCG@20 from 1 h on: −0\.\d{4} \[−0\.\d{4}, −0\.\d{4}\]", others[3])


def test_the_same_run_gives_the_same_bytes(files: ReportFiles, tmp_path: Path) -> None:
    again = write_report(RunFolder.open(files.html.parents[1]), tmp_path, QUICK)
    for one in ("html", "json", "arms", "curves"):
        assert getattr(again, one).read_bytes() == getattr(files, one).read_bytes()


def test_a_run_of_one_arm_and_one_query_has_a_report(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.add_queries(event=[3], event_time_ms=[T0], user_id=[1], item_id=[2], item_kind=[2], user_kind=[0])
    writer.add_ranks(
        "model", event=[3], rank=[4], num_candidates=[9], version=[0], weights_age_ms=[5], history_age_ms=[None]
    )
    writer.end_part()
    writer.write_manifest(
        RunManifest(
            name="least", is_complete=False, created_at="2026-01-02T03:04:05Z", config={}, lineage={}, seed=0,
            arms=[ArmInfo(name="model", kind="online", title="")], num_parts=1,
        )
    )  # fmt: skip
    files = write_report(RunFolder.open(tmp_path), tmp_path / "report", QUICK)
    text = "".join(_read(files.html).text)
    assert "The run is not complete" in text
    assert "model reaches NDCG@20 0.4307" in text


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-9, 1e6), num=st.integers(2, 10))
def test_ticks_are_round_and_span_the_values(low: float, span: float, num: int) -> None:
    ticks = nice_ticks(low, low + span, num)
    slack = 1e-6 * max(span, abs(low))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= 2.5 * num + 3


@pytest.mark.parametrize("days", [0.01, 0.5, 3, 40, 300, 4000])
def test_time_ticks_lie_within_the_span_and_are_few(days: float) -> None:
    ticks = time_ticks(T0, T0 + days * 86_400_000, 8)
    assert 1 <= len(ticks) <= 9
    assert all(T0 <= at <= T0 + days * 86_400_000 for at, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(
    ("scheme", "page", "card", "line"),
    [(1, "#fbfbfa", "#ffffff", "#0b62c4"), (0, "#14171b", "#1b1f24", "#6cb0ff")],
    ids=["light", "dark"],
)
def test_a_browser_without_a_network_draws_it_in_the_readers_colours(
    files: ReportFiles, tmp_path: Path, scheme: int, page: str, card: str, line: str
) -> None:
    from PIL import Image

    assert CHROMIUM is not None
    shot = tmp_path / "shot.png"
    width, height = 1180, 3600
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width},{height}", f"--screenshot={shot}", files.html.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    image = Image.open(shot).convert("RGB")
    assert image.size == (width, height)
    pixels = np.asarray(image)
    num_of = {name: int((pixels == list(bytes.fromhex(name[1:]))).all(2).sum()) for name in (page, card, line)}
    assert num_of[card] > 0.3 * width * height
    assert num_of[line] > 300, "the reference arm's line is not there"
    # Nothing sticks out of the page to the right, where no card is.
    assert (pixels[:, -3] == list(bytes.fromhex(page[1:]))).all()


def test_numbers_of_marks_that_would_lie_on_each_other_are_written_as_one() -> None:
    series = [Series("a", [(0.0, 0.1), (1000.0, 0.2)], 0)]
    chart = line_chart(series, [Mark(at, "drift") for at in (100, 105, 110, 800)], title="t")
    assert re.findall(r'<g class="mark"><text [^>]*>([^<]*)<', chart) == ["1–3", "4"]
    assert chart.count('<g class="mark"><title>drift</title><line') == 4
