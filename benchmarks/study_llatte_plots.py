"""Plots of study_llatte.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter


def draw(result: dict[str, Any], folder: Path) -> None:
    """llatte.png: a row for each stream. What the ranker gains as vectors grow old; NE over the upstream's FLOPs, and
    over those of a candidate online.
    """
    folder.mkdir(parents=True, exist_ok=True)
    streams = result["streams"]
    figure, rows = plt.subplots(len(streams), 3, figsize=(14, 4 * len(streams)), squeeze=False)
    for (name, found), axes in zip(streams.items(), rows, strict=True):
        for part, draw_part, one in zip(
            ("transfer", "scaling", "flops"), (_stale, _scaling, _flops), axes, strict=True
        ):
            if found.get(part) is not None:
                draw_part(one, found)
                one.set_title(f"{name}: {one.get_title()}", fontsize=10)
            else:
                one.set_axis_off()
    figure.tight_layout()
    figure.savefig(folder / "llatte.png", dpi=100)
    plt.close(figure)


def _stale(axes: Any, found: dict[str, Any]) -> None:
    stale = found["transfer"]["stale"]
    gains = [one["over_alone"]["gain_percent"] for one in stale.values()]
    errors = [one["over_alone"]["standard_error"] for one in stale.values()]
    axes.errorbar(range(len(stale)), gains, yerr=errors, marker="o", capsize=3, label="large upstream's vectors")
    best = found.get("ideal")
    if best is not None:
        alone = best["newest"]["8"]
        axes.plot([100 * (alone - ne) for ne in best["short_and_stale"].values()], "k:", label="the best possible")
    axes.axhline(found["transfer"]["small_over_alone"]["gain_percent"], color="C1", label="small upstream's, fresh")
    axes.set_xticks(range(len(stale)), list(stale))
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="what vectors miss", ylabel="NE below the ranker alone (%)", title="vectors that grow old")
    axes.legend(fontsize=8, loc="lower left")


def _scaling(axes: Any, found: dict[str, Any]) -> None:
    fits = found["scaling"]["fits"]
    for axis, marker in (("depth", "o"), ("length", "s"), ("width", "^")):
        points = [(one["flops"], one["ne"]) for name, one in found["scaling"]["arms"].items() if name.startswith(axis)]
        label = f"{axis}: α {fits[axis]['alpha']:.2f}, R² {fits[axis]['r2']:.2f}"
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=label)
    axes.set(xscale="log", xlabel="FLOPs of a vector", ylabel="NE", title="upstream model alone")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8)


def _flops(axes: Any, found: dict[str, Any]) -> None:
    part = found["flops"]
    for name, one in part["one_stage"].items():
        axes.plot(one["flops_of_8"], one["ne"], "o", color="C0")
        axes.annotate(name, (one["flops_of_8"], one["ne"]), textcoords="offset points", xytext=(4, 4), fontsize=8)
    both = part["two_stages"]
    axes.plot(both["flops_of_8"], both["ne"], "*", color="C3", markersize=12, label="with the large upstream's vectors")
    axes.set(xscale="log", xlabel="FLOPs of a candidate, 8 a request", ylabel="NE", title="one stage (layers x length)")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8)
