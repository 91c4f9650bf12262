"""Plots of study_llatte.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt


def draw(result: dict[str, Any], folder: Path) -> None:
    """llatte.png: what the ranker gains as vectors grow old, and NE over FLOPs."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    if "transfer" in result:
        _stale(left, result["transfer"]["stale"])
    if "scaling" in result:
        _scaling(right, result["scaling"]["arms"])
    figure.tight_layout()
    figure.savefig(folder / "llatte.png", dpi=110)
    plt.close(figure)


def _stale(axes: Any, stale: dict[str, Any]) -> None:
    gains = [one["over_alone"]["gain_percent"] for one in stale.values()]
    errors = [one["over_alone"]["standard_error"] for one in stale.values()]
    axes.errorbar(range(len(stale)), gains, yerr=errors, marker="o", capsize=3)
    axes.set_xticks(range(len(stale)), list(stale))
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="what the vector misses", ylabel="NE below the ranker alone (%)", title="Vectors that grow old")


def _scaling(axes: Any, arms: dict[str, Any]) -> None:
    for axis, marker in (("depth", "o"), ("length", "s"), ("width", "^")):
        points = [(one["flops"], one["ne"]) for name, one in arms.items() if name.startswith(axis)]
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=axis)
    axes.set(xscale="log", xlabel="FLOPs of the layers, one user", ylabel="NE", title="Upstream model alone")
    axes.legend()
