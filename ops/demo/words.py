"""What the demo prints at its end: the change, the checks, the verdict, and where to go from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from backtest.datasets import Title
from ops.demo.change import CLASSIC_BEFORE, NUM_ASKED, ChangeReport, title_of
from ops.demo.checks import Check
from ops.demo.plan import DemoOptions, Ports
from ops.demo.report import verdict
from ops.demo.state import HOP_WORDS, Sample, VectorFigures

_TITLE_WIDTH = 46


def print_change(console: Console, change: ChangeReport, titles: Mapping[int, Title]) -> None:
    """The user's lists side by side, and how long the change took."""
    console.rule(f"user {change.user_id}, who rates new films, gives these classics 10 of 10", align="left")
    for item_id in change.new_item_ids:
        console.print(Text(f"  + {_words(titles, item_id)}", style="cyan"))
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("", justify="right", style="bright_black")
    table.add_column(f"before: weights {change.version_before}")
    table.add_column(f"after: weights {change.version_after}")
    for place in range(max(len(change.before), len(change.after))):
        table.add_row(
            str(place + 1), _cell(change.before, place, change, titles), _cell(change.after, place, change, titles)
        )
    console.print(table)
    num_new, num_left = len(change.diff.entered), len(change.diff.left)
    classics = f"{change.classics_before} before, {change.classics_after} after"
    console.print(
        f"  {num_new} of {len(change.after)} are new (green), {num_left} left (red). "
        f"Films from before {CLASSIC_BEFORE} among the best {NUM_ASKED}: {classics}.",
        highlight=False,
    )
    history_s = max((seconds for seconds in change.history_s.values() if seconds is not None), default=None)
    used = "" if history_s is None else f"used the new history after {history_s:.2f} s, "
    console.print(
        f"  Answers of both workers {used}weights that had learned from it after {change.seconds:.2f} s.",
        style="bold",
        highlight=False,
    )


def print_checks(console: Console, checks: Sequence[Check]) -> None:
    """One line a check."""
    console.rule("checks", align="left")
    for check in checks:
        mark = Text("  ✓ ", style="green") if check.is_ok else Text("  ✗ ", style="bold red")
        console.print(mark.append(check.name, style="bold"))
        console.print(Padding(Text(check.detail, style="bright_black"), (0, 0, 0, 4)))


def print_results(console: Console, sample: Sample) -> None:
    """Quality and freshness in words."""
    console.rule("results", align="left")
    for sentence in verdict(sample.model, sample.popularity, sample.window).split("; "):
        console.print(f"  {sentence[0].upper()}{sentence[1:]}.", highlight=False)
    console.print("  Age of an event since the broker took it, slowest worker:", highlight=False)
    for hop, ages in sample.freshness.items():
        if ages.p50_ms is None or ages.p99_ms is None:
            continue
        console.print(
            f"    {hop} {HOP_WORDS[hop]:<14} p50 {ages.p50_ms / 1000:6.2f} s   p99 {ages.p99_ms / 1000:6.2f} s   "
            f"({ages.count:,} events)",
            highlight=False,
        )
    if sample.vectors is not None:
        for sentence in vectors_sentences(sample.vectors):
            console.print(f"  {sentence}", highlight=False, soft_wrap=True)
    pauses = [worker.pause_p99_ms for worker in sample.workers if worker.pause_p99_ms is not None]
    swaps = sum(worker.swaps for worker in sample.workers)
    if pauses:
        console.print(
            f"  {swaps:,} swaps of weights under load, pause p99 {max(pauses):.2f} ms; "
            f"{sample.num_answered:,} answers, {sample.num_failed} errors.",
            highlight=False,
        )


def vectors_sentences(vectors: VectorFigures) -> list[str]:
    """What the upstream daemon has done, and for how much of what the ranker learned there was a vector."""
    asked = vectors.num_found + vectors.num_missing
    found = [
        f"{vectors.num_written:,} vectors of users computed, upstream version {vectors.version or 'none'} in effect."
    ]
    if asked:
        quality = vectors.normalised_entropy
        ne = "" if quality is None else f" (NE for 8 or more, newest: {quality:.3f})"
        found.append(
            f"The ranker learned from {asked:,} ratings{ne}; of {vectors.num_found / asked:.0%} the user had a vector."
        )
    return found


def print_addresses(console: Console, ports: Ports, options: DemoOptions, user_id: int) -> None:
    """How to go on with everything left up."""
    first = ports.serving_urls()[0]
    console.rule("everything is up until Ctrl-C", align="left")
    for line in (
        *(f"  inference worker  {url}   (/docs, /status, /metrics)" for url in ports.serving_urls()),
        f"  ingest            http://127.0.0.1:{ports.ingest}/status",
        f"  trainer           http://127.0.0.1:{ports.trainer}/status",
        *([f"  upstream          http://127.0.0.1:{ports.upstream}/status"] if options.has_upstream else []),
        f"  settings          {options.run_dir / 'headrace.toml'}   logs {options.log_dir}",
        "",
        f'  curl -s {first}/v1/recommend -d \'{{"user_id": {user_id}, "k": 5}}\'',
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _cell(items: Sequence[int], place: int, change: ChangeReport, titles: Mapping[int, Title]) -> Text:
    if place >= len(items):
        return Text("")
    item_id = items[place]
    style = "green" if item_id in change.diff.entered else "red" if item_id in change.diff.left else ""
    return Text(_words(titles, item_id), style=style, overflow="ellipsis", no_wrap=True)


def _words(titles: Mapping[int, Title], item_id: int) -> str:
    title = title_of(titles, item_id)
    genres = ", ".join(title.genres[:3])
    name = title.title if len(title.title) <= _TITLE_WIDTH else title.title[: _TITLE_WIDTH - 1] + "…"
    return f"{name} · {genres}" if genres else name
