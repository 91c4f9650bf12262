"""The demo on a terminal: a live frame where there is one, plain lines elsewhere, and the words at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ops.demo.state import HOP_WORDS, Arm, Sample, WorkerFigures
from stream.freshness import FV_VECTOR

LINE_EVERY_S: Final = 5.0
_SPARK: Final = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH: Final = 32
_MODEL, _POPULARITY, _DIM, _GOOD, _BAD = "cyan", "yellow", "bright_black", "green", "bold red"


class View:
    """Shows samples as they come. `say` tells what is going on now; both kinds of terminal get it."""

    def __init__(self, console: Console, *, num_events: int, span: str) -> None:
        self.console = console
        self._num_events, self._span = num_events, span
        self._live: Live | None = None
        self._is_open = False
        self._now = "starting"
        self._samples: list[Sample] = []
        self._line_at_s = 0.0

    def __enter__(self) -> Self:
        self._is_open = True
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=False, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_open = False
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, words: str) -> None:
        """What is going on now, in words."""
        self._now = words
        if self._live is None:
            self.console.print(plain_time(self._samples[-1].at_s if self._samples else 0.0), words, highlight=False)
        else:
            self._refresh()

    def show(self, sample: Sample) -> None:
        """Take in a sample."""
        self._samples.append(sample)
        if self._live is not None:
            self._refresh()
        elif self._is_open and sample.num_sent and time.monotonic() - self._line_at_s >= LINE_EVERY_S:
            self._line_at_s = time.monotonic()
            self.console.print(plain_line(sample, self._num_events), highlight=False, soft_wrap=True)

    def _refresh(self) -> None:
        if self._live is not None and self._samples:
            self._live.update(
                frame(self._samples, now=self._now, num_events=self._num_events, span=self._span), refresh=True
            )


def plain_time(at_s: float) -> str:
    """`[ 65 s]`."""
    return f"[{at_s:3.0f} s]"


def plain_line(sample: Sample, num_events: int) -> str:
    """One line for terminals that only scroll, and for log files."""
    f4 = sample.freshness["F4"]
    pauses = [worker.pause_p99_ms for worker in sample.workers if worker.pause_p99_ms is not None]
    parts = [
        f"{sample.num_learned / max(num_events, 1):4.0%} learned, {sample.learned_per_s:,.0f} events/s, "
        f"lag {sample.lag_ingest:,} + {sample.lag_trainer:,}",
        f"HR@10 model {_share(sample.model.window)} popularity {_share(sample.popularity.window)}",
        f"snapshot {_count(sample.snapshot_version)} {sample.snapshot_kind or ''} {_bytes(sample.snapshot_bytes)}, "
        f"swap pause p99 {_ms(max(pauses, default=None))}",
        f"F4 p50 {_age(f4.p50_ms)} p99 {_age(f4.p99_ms)}",
        f"{sample.num_answered:,} answers, {sample.num_failed} errors",
    ]
    if sample.vectors is not None:
        parts.append(
            f"vectors {sample.vectors.num_written:,}, {sample.vectors.num_waiting:,} waiting, "
            f"FV p50 {_age(sample.freshness[FV_VECTOR].p50_ms)}"
        )
    return f"{plain_time(sample.at_s)} {' | '.join(parts)}"


def frame(samples: Sequence[Sample], *, now: str, num_events: int, span: str) -> RenderableType:
    """The live frame: what happens now, the stream, quality, snapshots, freshness, requests."""
    sample = samples[-1]
    body = Table.grid(expand=True, padding=0)
    body.add_column(ratio=1)
    body.add_column(ratio=1)
    body.add_row(
        Panel(_stream(sample, num_events), title="stream", title_align="left", border_style=_DIM),
        Panel(
            _freshness(sample), title="age of events since the broker took them", title_align="left", border_style=_DIM
        ),
    )
    body.add_row(
        Panel(_snapshots(sample), title="weights", title_align="left", border_style=_DIM),
        Panel(_requests(sample), title="answers", title_align="left", border_style=_DIM),
    )
    return Group(
        _head(sample, now, num_events, span),
        body,
        Panel(
            _quality(samples),
            title="HR@10 over the whole catalogue, each event predicted before it is learned from",
            title_align="left",
            border_style=_DIM,
        ),
    )


def _head(sample: Sample, now: str, num_events: int, span: str) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column()
    line.add_column(justify="right")
    line.add_row(Text("headrace demo", style="bold"), Text(f"{span}   {_clock(sample.at_s)}", style=_DIM))
    bar = Table.grid(expand=True)  # a bar alone does not end its line
    bar.add_row(ProgressBar(total=num_events, completed=sample.num_learned))
    words = Text(" ▸ ", style=f"bold {_GOOD}", no_wrap=True, overflow="ellipsis")
    words.append(now, style="bold")
    return Group(line, bar, words)


def _stream(sample: Sample, num_events: int) -> RenderableType:
    table = _grid(4)
    for word, count, rate, lag in (
        ("sent", sample.num_sent, sample.sent_per_s, None),
        ("stored", sample.num_stored, sample.stored_per_s, sample.lag_ingest),
        ("learned from", sample.num_learned, sample.learned_per_s, sample.lag_trainer),
    ):
        behind = "" if lag is None else f"lag {lag:,}"
        table.add_row(word, Text(f"{count:,}", style="bold"), f"{rate:,.0f}/s", Text(behind, style=_DIM))
    table.add_row("of", f"{num_events:,}", "", Text(f"{sample.num_items:,} items", style=_DIM))
    reached = (
        "" if sample.event_time_ms is None else f"{datetime.fromtimestamp(sample.event_time_ms / 1000, UTC):%d %b %Y}"
    )
    table.add_row(
        "stream is at", reached, "", Text(f"{sample.refused} refused", style=_BAD if sample.refused else _DIM)
    )
    return table


def _freshness(sample: Sample) -> RenderableType:
    table = _grid(4)
    table.add_row("", "", Text("p50", style=_DIM), Text("p99", style=_DIM))
    for hop, ages in sample.freshness.items():
        bold = "bold" if hop == "F4" else ""
        table.add_row(
            f"{hop} {HOP_WORDS[hop]}", "", Text(_age(ages.p50_ms), style=bold), Text(_age(ages.p99_ms), style=bold)
        )
    return table


def _snapshots(sample: Sample) -> RenderableType:
    table = _grid(2)
    size = f"{sample.snapshot_kind}, {_bytes(sample.snapshot_bytes)}" if sample.snapshot_kind else "nothing yet"
    table.add_row("published", Text.assemble((_count(sample.snapshot_version), "bold"), f"  {size}"))
    for name, worker in zip("ab", sample.workers, strict=False):
        table.add_row(f"worker {name}", _worker(worker))
    return table


def _worker(worker: WorkerFigures) -> Text:
    if worker.version is None:
        return Text("no weights yet", style=_DIM)
    pauses = f"  pause {_ms(worker.pause_last_ms)}, p99 {_ms(worker.pause_p99_ms)}"
    return Text.assemble((str(worker.version), "bold"), pauses)


def _requests(sample: Sample) -> RenderableType:
    table = _grid(2)
    failed = Text(f"{sample.num_failed} errors", style=_BAD if sample.num_failed else _GOOD)
    table.add_row("answered", Text.assemble((f"{sample.num_answered:,}", "bold"), "  ", failed))
    for name, worker in zip("ab", sample.workers, strict=False):
        table.add_row(f"worker {name}", f"p50 {_ms(worker.latency_p50_ms)}, p99 {_ms(worker.latency_p99_ms)}")
    return table


def _quality(samples: Sequence[Sample]) -> RenderableType:
    sample = samples[-1]
    arms = [[getattr(one, name).window for one in samples] for name in ("model", "popularity")]
    top = max((value for arm in arms for value in arm if value), default=0.0)
    table = Table.grid(expand=True, padding=(0, 2))
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_row("", "", Text(f"last {sample.window:,}", style=_DIM), Text("all so far", style=_DIM))
    for word, arm, values, colour in (
        ("model", sample.model, arms[0], _MODEL),
        ("decayed popularity", sample.popularity, arms[1], _POPULARITY),
    ):
        table.add_row(
            Text(word, style=colour),
            Text(sparkline(values, top, _SPARK_WIDTH), style=colour),
            Text(_share(arm.window), style=f"bold {colour}"),
            _share(arm.lifetime),
        )
    table.add_row(
        "model is ahead by", "", _ahead(sample.model.window, sample.popularity.window), _lifetime_ahead(sample)
    )
    return table


def _lifetime_ahead(sample: Sample) -> Text:
    return _ahead(sample.model.lifetime, sample.popularity.lifetime)


def _ahead(ours: float | None, theirs: float | None) -> Text:
    if not ours or not theirs:
        return Text("–", style=_DIM)
    share = ours / theirs - 1
    return Text(f"{share:+.0%}", style=_GOOD if share > 0 else _POPULARITY)


def sparkline(values: Sequence[float | None], top: float, width: int) -> str:
    """`width` columns from 0 to `top`, each the last value of its part of the series; blank where nothing is known."""
    if not values or top <= 0:
        return " " * width
    picked = (
        [values[(column + 1) * len(values) // width - 1] for column in range(width)] if len(values) >= width else values
    )
    last = len(_SPARK) - 1
    bars = "".join(" " if value is None else _SPARK[min(last, round(value / top * last))] for value in picked)
    return bars.ljust(width)


def _grid(num_columns: int) -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    for column in range(num_columns):
        table.add_column(justify="left" if column == 0 or num_columns == 2 else "right", no_wrap=True)
    return table


def _clock(at_s: float) -> str:
    return f"{int(at_s) // 60}:{int(at_s) % 60:02d}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} ms" if value < 100 else f"{value / 1000:.2f} s"


def _age(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} ms" if value < 1000 else f"{value / 1000:.2f} s"


def _bytes(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


__all__ = ["LINE_EVERY_S", "Arm", "View", "frame", "plain_line", "plain_time", "sparkline"]
