"""Charts as SVG text, without scripts. Colours are the page's, so they follow light and dark; each one has a name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from typing import Final

WIDTH: Final = 960
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 238, 26, 30
_LABEL_HEIGHT: Final = 15.0
_NUMBER_WIDTH: Final = 16.0
_NICE: Final = (1.0, 2.0, 2.5, 5.0, 10.0)
_MINUTES = (1, 5, 15, 60, 180, 360, 720)
_DAYS = (1, 2, 7, 14, 28, 91, 182, 364, 1820)
_TIME_STEPS: Final = (*(timedelta(minutes=n) for n in _MINUTES), *(timedelta(days=n) for n in _DAYS))


@dataclass(frozen=True, slots=True)
class Series:
    """A line: (time in ms, value), in order of time. slot: which of the page's eight colours and dashes."""

    name: str
    points: Sequence[tuple[float, float]]
    slot: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment worth knowing: an upright line, `text` when pointed at."""

    time_ms: int
    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """Items that came and went in a span of time."""

    time_ms: int
    num_new: int
    num_retired: int


@dataclass(frozen=True, slots=True)
class Whisker:
    """A mean with its interval; label: what it is of."""

    label: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float
    slot: int


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values → pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def nice_ticks(low: float, high: float, num: int) -> list[float]:
    """Round values about `num` in number that span low … high: the first at or below, the last at or above."""
    span = high - low or abs(high) or 1.0
    raw = span / max(num, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in _NICE if power * nice >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * at, 12) for at in range(first, max(last, first + 1) + 1)]


def time_ticks(first_ms: float, last_ms: float, num: int) -> list[tuple[int, str]]:
    """Round moments (UTC) within a span, about `num`, with their labels."""
    span = timedelta(milliseconds=max(last_ms - first_ms, 1))
    step = next((step for step in _TIME_STEPS if span / step <= num), _TIME_STEPS[-1])
    step_ms = int(step.total_seconds() * 1000)
    pattern = "%d %b %Y" if step >= timedelta(days=91) else "%d %b" if step >= timedelta(days=1) else "%d %b %H:%M"
    first = -(-int(first_ms) // step_ms) * step_ms
    return [
        (at, (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at)).strftime(pattern))
        for at in range(first, int(last_ms) + 1, step_ms)
    ]


def line_chart(series: Sequence[Series], marks: Sequence[Mark], *, title: str, height: int = 360) -> str:
    """Lines over time, named at their right ends."""
    times = [time for one in series for time, _ in one.points]
    values = [value for one in series for _, value in one.points]
    ticks = nice_ticks(min(0.0, *values), max(values), 5)
    x = _Scale(min(times), max(times), _LEFT, WIDTH - _RIGHT)
    y = _Scale(ticks[0], ticks[-1], height - _BOTTOM, _TOP)
    parts = [*_grid(ticks, y), *_time_axis(x, height - _BOTTOM), *_marks(marks, x, height - _BOTTOM)]
    for one in series:
        path = " ".join(
            f"{'L' if place else 'M'}{x(time)} {y(value)}" for place, (time, value) in enumerate(one.points)
        )
        parts.append(f'<path class="line s{one.slot}" d="{path}"><title>{escape(one.name)}</title></path>')
    parts += _end_labels([(one.name, y(one.points[-1][1]), one.slot) for one in series if one.points], height)
    return _svg(parts, title, height)


def catalogue_chart(
    bars: Sequence[Bar], span: tuple[float, float], marks: Sequence[Mark], *, num_spans: int, title: str
) -> str:
    """New items upward, retired ones downward, in spans of equal time, over the span of the chart above it."""
    height = 150
    most = max((bar.num_new for bar in bars), default=1)
    least = max((bar.num_retired for bar in bars), default=0)
    ticks = nice_ticks(-float(least), float(max(most, 1)), 3)
    x = _Scale(*span, _LEFT, WIDTH - _RIGHT)
    y = _Scale(ticks[0], ticks[-1], height - _BOTTOM, _TOP)
    width = (WIDTH - _LEFT - _RIGHT) / num_spans - 1
    parts = [*_grid(ticks, y, signed=False), *_time_axis(x, height - _BOTTOM), *_marks(marks, x, height - _BOTTOM)]
    for bar in bars:
        left = min(max(x(bar.time_ms), _LEFT), WIDTH - _RIGHT - width)
        for count, kind in ((bar.num_new, "new"), (-bar.num_retired, "retired")):
            top, bottom = sorted((y(count), y(0)))
            if count:
                parts.append(
                    f'<rect class="{kind}" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{bottom - top:.1f}">'
                    f"<title>{abs(count):,} items {kind}</title></rect>"
                )
    parts.append(f'<text class="key new-key" x="{WIDTH - _RIGHT + 12}" y="{_TOP + 8}">▲ new items</text>')
    parts.append(f'<text class="key retired-key" x="{WIDTH - _RIGHT + 12}" y="{_TOP + 28}">▼ retired items</text>')
    return _svg(parts, title, height)


def ablation_ticks(points: Sequence[Whisker], levels: Sequence[Level]) -> list[float]:
    """Values at the axis of an ``ablation_chart``, which need not begin at 0."""
    values = [bound for point in points for bound in (point.low, point.high)] + [level.value for level in levels]
    margin = 0.08 * (max(values) - min(values) or 1e-3)
    return nice_ticks(max(0.0, min(values) - margin), max(values) + margin, 5)


def ablation_chart(points: Sequence[Whisker], levels: Sequence[Level], *, title: str, height: int = 340) -> str:
    """Means with intervals from the freshest to the oldest, beside levels to beat."""
    ticks = ablation_ticks(points, levels)
    y = _Scale(ticks[0], ticks[-1], height - _BOTTOM - 14, _TOP)
    step = (WIDTH - _LEFT - _RIGHT) / max(len(points), 1)
    at = [round(_LEFT + step * (place + 0.5), 1) for place in range(len(points))]
    parts = _grid(ticks, y)
    for level in levels:
        parts.append(
            f'<line class="line level s{level.slot}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(level.value)}" '
            f'y2="{y(level.value)}"><title>{escape(level.name)} {level.value:.4f}</title></line>'
        )
    path = " ".join(f"{'L' if place else 'M'}{at[place]} {y(point.mean)}" for place, point in enumerate(points))
    parts.append(f'<path class="line s0" d="{path}"/>')
    for left, point in zip(at, points, strict=True):
        parts.append(_whisker_up(left, point, y))
        parts.append(f'<text class="tick" x="{left}" y="{height - _BOTTOM + 6}">{escape(point.label)}</text>')
    parts += _end_labels([(level.name, y(level.value), level.slot) for level in levels], height)
    return _svg(parts, title, height)


def interval_cell(whisker: Whisker, span: tuple[float, float], slot: int) -> str:
    """A small picture for a table: where a mean and its interval lie in a span that all rows share."""
    width, height = 150, 22
    x = _Scale(*span, 6, width - 6)
    middle = height / 2
    zero = ""
    if span[0] <= 0 <= span[1]:
        zero = f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="1" y2="{height - 1}"/>'
    spoken = escape(f"{whisker.label}: {whisker.mean:.4f}, {whisker.low:.4f} to {whisker.high:.4f}")
    return (
        f'<svg class="cell" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{spoken}">{zero}'
        f'<line class="whisker s{slot}" x1="{x(whisker.low)}" x2="{x(whisker.high)}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="dot s{slot}" cx="{x(whisker.mean)}" cy="{middle}" r="4"/></svg>'
    )


def _whisker_up(left: float, point: Whisker, y: _Scale) -> str:
    low, high = y(point.low), y(point.high)
    spoken = escape(f"{point.label}: {point.mean:.4f}, {point.low:.4f} to {point.high:.4f}")
    return (
        f'<g><title>{spoken}</title><line class="whisker s0" x1="{left}" x2="{left}" y1="{low}" y2="{high}"/>'
        f'<line class="whisker s0" x1="{left - 5}" x2="{left + 5}" y1="{low}" y2="{low}"/>'
        f'<line class="whisker s0" x1="{left - 5}" x2="{left + 5}" y1="{high}" y2="{high}"/>'
        f'<circle class="dot s0" cx="{left}" cy="{y(point.mean)}" r="4.5"/></g>'
    )


def _grid(ticks: Sequence[float], y: _Scale, *, signed: bool = True) -> list[str]:
    """Horizontal lines with their values; not signed: what lies below 0 is a count, too."""
    parts = []
    digits = _digits(ticks[1] - ticks[0]) if signed else 0
    for tick in ticks:
        shown = f"{tick if signed else abs(tick):,.{digits}f}"
        kind = "axis" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y(tick) + 4}">{shown}</text>')
    return parts


def _digits(step: float) -> int:
    """Decimal places that tell ticks apart and say no other value than theirs."""
    return next((places for places in range(12) if abs(round(step, places) - step) < 1e-9 * step), 12)


def _time_axis(x: _Scale, bottom: float) -> list[str]:
    return [
        f'<line class="grid" x1="{x(at)}" x2="{x(at)}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text class="tick" x="{x(at)}" y="{bottom + 18}">{label}</text>'
        for at, label in time_ticks(x.low, x.high, 8)
    ]


def _marks(marks: Iterable[Mark], x: _Scale, bottom: float) -> list[str]:
    """Numbered as in the list beneath the chart; numbers that would lie on each other are written as one, `2–4`."""
    shown = [(number, mark, x(mark.time_ms)) for number, mark in enumerate(marks, 1) if x.low <= mark.time_ms <= x.high]
    lines = [
        f'<g class="mark"><title>{escape(mark.text)}</title>'
        f'<line x1="{left}" x2="{left}" y1="{_TOP - 8}" y2="{bottom}"/></g>'
        for _, mark, left in shown
    ]
    groups: list[list[tuple[int, float]]] = []
    for number, _, left in shown:
        if groups and left - groups[-1][-1][1] < _NUMBER_WIDTH:
            groups[-1].append((number, left))
        else:
            groups.append([(number, left)])
    for group in groups:
        (first, left), (last, right) = group[0], group[-1]
        label = f"{first}" if first == last else f"{first}–{last}"
        lines.append(f'<g class="mark"><text x="{(left + right) / 2:.1f}" y="{_TOP - 12}">{label}</text></g>')
    return lines


def _end_labels(labels: Sequence[tuple[str, float, int]], height: int) -> list[str]:
    """Names at the right end of lines, moved apart where they would overlap, joined to their line by a stroke."""
    placed: list[tuple[str, float, int, float]] = []
    below = -math.inf
    for name, wanted, slot in sorted(labels, key=lambda label: label[1]):
        below = max(wanted, below + _LABEL_HEIGHT)
        placed.append((name, wanted, slot, below))
    overflow = max(0.0, below - (height - _BOTTOM + 4))
    tops = [at - overflow for _, _, _, at in placed]
    for place in range(len(tops) - 2, -1, -1):
        tops[place] = min(tops[place] + overflow, tops[place + 1] - _LABEL_HEIGHT)
    left = WIDTH - _RIGHT
    return [
        f'<path class="lead s{slot}" d="M{left + 1} {wanted:.1f} L{left + 12} {top:.1f}"/>'
        f'<text class="name s{slot}" x="{left + 16}" y="{top + 4:.1f}">{escape(_short(name))}</text>'
        for (name, wanted, slot, _), top in zip(placed, tops, strict=True)
    ]


def _short(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:29].rstrip(' ,')}…"


def _svg(parts: Iterable[str], title: str, height: int) -> str:
    content = "".join(itertools.chain(parts))
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{content}</svg>'
