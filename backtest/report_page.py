"""The report as one HTML page: no scripts, nothing fetched, colours by the reader's own light or dark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Final

import polars as pl

from backtest.evaluation import Evaluation, EvaluationConfig
from backtest.report_html import cell, duration, level, seconds, section, table, utc, whisker
from backtest.report_svg import (
    Bar,
    Level,
    Mark,
    Series,
    ablation_chart,
    ablation_ticks,
    catalogue_chart,
    line_chart,
)
from backtest.report_tables import MAIN_METRIC, arms_table, costs_table, lists_table, slices_table, vectors_table
from backtest.report_words import METRIC_NAMES, age_text, arm_title, figure, findings
from backtest.run_files import RunFolder, RunManifest
from online_trainer.prequential import ALL

_LINES_MAX: Final = 7
"""Lines of a chart: more cannot be told apart."""
_MARKS_MAX: Final = 12
_NUM_SPANS: Final = 60
"""In which new and retired items are counted."""
_ABLATIONS: Final = {
    "publish_every": ("How fresh must the weights be?", "weights published every", "how often weights were published"),
    "weights_lag": ("What do late weights cost?", "lag of weights", "how late published weights reached replicas"),
    "histories_lag": ("What do late histories cost?", "lag of histories", "how late interactions reached histories"),
}


def page(run: RunFolder, evaluation: Evaluation, config: EvaluationConfig) -> str:
    """The whole page."""
    manifest = run.manifest
    slots = _slots(evaluation)
    marks = _marks(run.drift().collect())
    sections = [
        _head(manifest, evaluation, config),
        section("Every arm, the same queries", arms_table(evaluation, slots)),
        section("As the stream went on", _over_time(run, evaluation, slots, marks)),
        *(section(_ABLATIONS[kind][0], _ablation(kind, evaluation, slots)) for kind in evaluation.ablations),
        section("New items, new users", slices_table(evaluation)),
        section("What would have been shown", lists_table(evaluation)),
        *([section("What users' vectors bring", vectors_table(manifest))] if manifest.vectors else []),
        section("What it cost", costs_table(manifest, evaluation)),
        section("How this was made", _made(manifest, evaluation, config)),
    ]
    style = (Path(__file__).parent / "report_style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(manifest.name)} – headrace backtest</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{''.join(sections)}\n</main></body></html>\n"
    )


def _slots(evaluation: Evaluation) -> dict[str, int]:
    """Arm → colour, of those that get lines: the reference, what is no point of a curve, the oldest points."""
    best = sorted(evaluation.arms, key=lambda arm: -(arm.metrics[ALL][MAIN_METRIC].mean or 0.0))
    names = [evaluation.reference, *(arm.info.name for arm in best if arm.info.ablation is None)]
    names += [points[-1].arm for points in (evaluation.ablations.get("publish_every"),) if points]
    return {name: slot for slot, name in enumerate(list(dict.fromkeys(names))[:_LINES_MAX])}


def _marks(drift: pl.DataFrame) -> list[Mark]:
    """The decisions with a reaction first, if there are too many; in order of time."""
    chosen = drift.sort(pl.col("reactions") == "", "time_ms").head(_MARKS_MAX).sort("time_ms")
    return [Mark(row["time_ms"], f"{utc(row['time_ms'])}: {row['sentence']}") for row in chosen.iter_rows(named=True)]


def _head(manifest: RunManifest, evaluation: Evaluation, config: EvaluationConfig) -> str:
    first, last = manifest.evaluated_from_ms or manifest.first_event_time_ms, manifest.last_event_time_ms
    spans = f"{utc(first)} to {utc(last)}" if first is not None and last is not None else ""
    facts = {
        "events replayed": f"{manifest.num_events:,}",
        "queries evaluated": f"{evaluation.num_queries:,}",
        "arms": f"{len(evaluation.arms)}",
        "events a second": f"{manifest.num_events / manifest.wall_s:,.0f}" if manifest.wall_s else "–",
        "CPU": seconds(manifest.cpu_s),
    }
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(evaluation, MAIN_METRIC))
    unfinished = (
        "" if manifest.is_complete else "<p><strong>The run is not complete: this is what it has so far.</strong></p>"
    )
    return (
        f"<header><h1>{escape(manifest.name)}</h1><p>Backtest of {spans}. Every query was answered from what was known "
        f"before it, ranked among the whole catalogue. {level(config)} intervals in brackets.</p>{unfinished}</header>"
        f'<section><h2>What the data say</h2><ul class="findings">{said}</ul><dl class="facts">{shown}</dl></section>'
    )


def _over_time(run: RunFolder, evaluation: Evaluation, slots: dict[str, int], marks: Sequence[Mark]) -> str:
    own = evaluation.curves.filter(pl.col("metric") == MAIN_METRIC)
    series = [
        Series(
            arm_title(evaluation.arm(name)),
            list(own.filter(pl.col("arm") == name).select("time_ms", "mean").iter_rows()),
            slot,
        )
        for name, slot in slots.items()
    ]
    first, last = own["time_ms"].to_numpy().min(), own["time_ms"].to_numpy().max()
    title = f"{METRIC_NAMES[MAIN_METRIC]} of {len(series)} arms over time"
    spacing = timedelta(milliseconds=int(last - first) // max(own["time_ms"].n_unique() - 1, 1))
    parts = [
        f'<p class="note">{METRIC_NAMES[MAIN_METRIC]} over the queries of each {duration(spacing)}, not smoothed. '
        f"{'Numbers mark what the drift detectors decided.' if marks else ''}</p>",
        line_chart(series, marks, title=title),
    ]
    timeline = run.timeline().filter(pl.col("time_ms").is_between(int(first), int(last))).collect()
    bars = _bars(timeline, int(first), int(last))
    if bars:
        parts.append(
            catalogue_chart(
                bars, (float(first), float(last)), marks, num_spans=_NUM_SPANS, title="Items that came and went"
            )
        )
        parts.append(
            f'<p class="note">The catalogue: {timeline["num_items"][0]:,} items at first, '
            f"{timeline['num_items'][-1]:,} at the end.</p>"
        )
    if marks:
        parts.append(f'<ol class="marks">{"".join(f"<li>{escape(mark.text)}</li>" for mark in marks)}</ol>')
    rows = [
        f'<tr><th scope="row">{utc(key[0])}</th>'  # one row a point, one column an arm
        + "".join(f"<td>{figure(values.get(name))}</td>" for name in slots)
        + "</tr>"
        for key, values in _by_time(own, slots)
    ]
    heads = ["from", *(escape(arm_title(evaluation.arm(name))) for name in slots)]
    parts.append(f"<details><summary>The figures</summary>{table(heads, rows, title)}</details>")
    return "".join(parts)


def _by_time(own: pl.DataFrame, slots: dict[str, int]) -> Iterator[tuple[tuple[int], dict[str, float]]]:
    kept = own.filter(pl.col("arm").is_in(list(slots))).sort("time_ms")
    for key, frame in kept.group_by("time_ms", maintain_order=True):
        yield (int(key[0]),), dict(frame.select("arm", "mean").iter_rows())


def _bars(timeline: pl.DataFrame, first_ms: int, last_ms: int) -> list[Bar]:
    """The timeline in spans of equal time."""
    width = max((last_ms - first_ms) // _NUM_SPANS, 1)
    spans = timeline.group_by((pl.col("time_ms") - first_ms) // width).agg(
        pl.col("num_new_items").sum(), pl.col("num_retired_items").sum()
    )
    return [
        Bar(first_ms + place * width, num_new, num_retired)
        for place, num_new, num_retired in spans.sort("time_ms").iter_rows()
        if num_new or num_retired
    ]


def _ablation(kind: str, evaluation: Evaluation, slots: dict[str, int]) -> str:
    points = evaluation.ablations[kind]
    whiskers = [whisker(age_text(kind, point.age_ms), point.metrics[MAIN_METRIC]) for point in points]
    levels = [
        Level(arm_title(arm), mean, slots[arm.info.name])
        for arm in evaluation.arms
        if arm.info.ablation is None and arm.info.name in slots
        if (mean := arm.metrics[ALL][MAIN_METRIC].mean) is not None
    ]
    shown = [whisker for whisker in whiskers if whisker is not None]
    if not shown:
        return '<p class="note">Nothing was measured.</p>'
    rows = [
        f'<tr><th scope="row">{age_text(kind, point.age_ms)}</th>{cell(point.metrics[MAIN_METRIC])}'
        f"{cell(point.against_freshest.get(MAIN_METRIC), signed=True)}</tr>"
        for point in points
    ]
    name = METRIC_NAMES[MAIN_METRIC]
    _, head, by = _ABLATIONS[kind]
    heads = [head, name, f"difference to {age_text(kind, points[0].age_ms)}, paired"]
    begins = " The axis does not begin at 0." if ablation_ticks(shown, levels)[0] > 0 else ""
    return (
        f'<p class="note">{name} by {by}. Dashed: what there is to beat.{begins}</p>'
        + ablation_chart(shown, levels, title=f"{name} by {by}")
        + table(heads, rows, "One training; the arms differ in what had reached the replicas")
    )


def _made(manifest: RunManifest, evaluation: Evaluation, config: EvaluationConfig) -> str:
    blocks = "users" if config.bootstrap.resample == "user" else f"{config.bootstrap.num_blocks} spans of equal time"
    counts = ", ".join(f"{name} {count:,}" for name, count in manifest.counts.items())
    method = (
        "Metrics: one relevant item a query, ranked among the whole live catalogue without what the user had seen; "
        f"ties count as worse, an item that cannot be recommended is a miss. {level(config)} intervals: percentiles of "
        f"{config.bootstrap.num_resamples:,} resamples of {blocks}, the same for all arms; reference: "
        f"{arm_title(evaluation.arm(evaluation.reference))}."
    )
    parts = [f"<p>{escape(method)}</p>", f'<p class="note">Events: {escape(counts)}</p>' if counts else ""]
    for name, value, is_open in (
        ("Lineage", {**manifest.lineage, "created_at": manifest.created_at, "seed": manifest.seed}, True),
        ("Fingerprints (sha256, equal for equal runs)", manifest.fingerprints, False),
        ("Configuration", manifest.config, False),
    ):
        text = escape(json.dumps(value, indent=2, ensure_ascii=False))
        parts.append(f"<details{' open' if is_open else ''}><summary>{name}</summary><pre>{text}</pre></details>")
    return "".join(parts)
