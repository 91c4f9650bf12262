"""`headrace freshness` on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ops.freshness_report import AgeFigures, FreshnessReport, HopFigures, ReplicaFigures
from ops.readable import duration, readable, utc_time
from stream.freshness import RECENT_MS

_QUANTILES: Final = ("p50", "p95", "p99")
_WIDE_FROM: Final = 128
"""Columns of a terminal that hold everything beside each other."""


def rendered(report: FreshnessReport, *, width: int) -> RenderableType:
    """Both tables, what does not answer, and whether anything happens at all.

    width: of the terminal. Where it is narrow, p95 is left out and headings are broken: 80 columns are enough then.
    """
    is_wide = width >= _WIDE_FROM
    parts: list[RenderableType] = [_hops(report.hops, is_wide=is_wide)]
    if report.replicas:
        parts.append(_replicas(report.replicas, is_wide=is_wide))
    parts += [Text(f"{readable(who)}: {readable(why)}", style="yellow") for who, why in report.problems.items()]
    recent = duration(RECENT_MS)
    state = f"idle: nothing came in {recent}, nothing waits" if report.is_idle else f"events of the newest {recent}"
    parts.append(Text(f"{utc_time(report.at_ms)}  {state}", style="bright_black"))
    return Group(*parts)


def _table(columns: Sequence[str], *, is_wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bright_black", collapse_padding=not is_wide)
    for place, name in enumerate(columns):
        heading = name if is_wide else name.replace(" ", "\n")
        table.add_column(heading, justify="left" if place == 0 else "right", no_wrap=place != 0)
    return table


def _quantiles(*, is_wide: bool) -> tuple[str, ...]:
    return _QUANTILES if is_wide else ("p50", "p99")


def _hops(hops: Sequence[HopFigures], *, is_wide: bool) -> Table:
    quantiles = _quantiles(is_wide=is_wide)
    ages = [f"{start} {quantile}" for start in ("append", "event") for quantile in quantiles]
    table = _table(["hop", "events", "waiting", "coverage", *ages, "negative"], is_wide=is_wide)
    for one in hops:
        negative = one.append.num_negative + one.event.num_negative
        coverage = "–" if one.coverage is None else f"{one.coverage:.1%}"
        counts = (_count(one.num_events), _count(one.num_waiting), coverage)
        figures = (*_ages(one.append, quantiles), *_ages(one.event, quantiles), _count(negative))
        table.add_row(f"{one.hop} {one.what}", *counts, *figures)
    return table


def _replicas(replicas: Sequence[ReplicaFigures], *, is_wide: bool) -> Table:
    quantiles = _quantiles(is_wide=is_wide)
    table = _table(
        ["replica", "version", "events", *(f"F4 append {q}" for q in quantiles), "weights behind", "weights age"],
        is_wide=is_wide,
    )
    for one in replicas:
        name = readable(one.replica) if one.is_running else f"{readable(one.replica)} (not running)"
        ages = (_age(one.weights_behind_ms), _age(one.weights_age_ms))
        table.add_row(name, _count(one.version), _count(one.num_events), *_ages(one.append, quantiles), *ages)
    return table


def _ages(figures: AgeFigures, quantiles: Sequence[str]) -> list[str]:
    told = {"p50": figures.p50_ms, "p95": figures.p95_ms, "p99": figures.p99_ms}
    return [_age(told[quantile]) for quantile in quantiles]


def _age(milliseconds: float | None) -> str:
    return "–" if milliseconds is None else duration(milliseconds)


def _count(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"
