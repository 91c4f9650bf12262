"""Plots of study_ultra.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

COLOURS: Final = {"hstu": "#8b949e", "hstu_merged": "#d29922", "ultra": "#1f6feb"}


def draw(rows: list[dict[str, Any]], streams: dict[str, float | None], path: Path) -> None:
    """Quality against operations of training and of inference, a row of pictures for each stream.

    streams: and the best possible, where it is known.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, all_axes = pyplot.subplots(
        len(streams), 2, figsize=(11, 4.2 * len(streams)), layout="constrained", squeeze=False
    )
    for of_stream, (stream, ideal) in zip(all_axes, streams.items(), strict=True):
        for axes, kind in zip(of_stream, ("training", "inference"), strict=True):
            for family, colour in COLOURS.items():
                own = [row for row in rows if row["stream"] == stream and row["group"] == "grid"]
                points = [row for row in own if row["family"] == family]
                if not points:
                    continue
                x = [row[f"{kind}_flops"] for row in points]
                label = family.replace("_", ", ")
                axes.scatter(x, [row["ndcg_at_20"] for row in points], color=colour, label=label, alpha=0.8)
                for row in points:
                    if "seed" in row["model"]:
                        continue
                    at, size = (row[f"{kind}_flops"], row["ndcg_at_20"]), row["name"].split("-")[1]
                    axes.annotate(size, at, fontsize=7, xytext=(3, 3), textcoords="offset points")
            if ideal:
                axes.axhline(ideal, color="#3fb950", linestyle=":", label="ideal")
            axes.set(title=stream, xlabel=f"operations of {kind}, per interaction", ylabel="NDCG@20", xscale="log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.margins(x=0.1)
            axes.grid(visible=True, alpha=0.25)
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
