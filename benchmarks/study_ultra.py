"""ULTRA-HSTU against HSTU: quality against operations over depth and length, and each part alone.

    python benchmarks/study_ultra.py [--streams long_range movietweetings liked] [--quick] [--results FOLDER]

Three streams: `long_range` (backtest.long_range), simulated, where a seventh of what comes next depends on what lies
120 interactions back and more, and the ideal is known (*far HR*: of those alone); the first ratings of movietweetings,
where few histories are long; and the same with ratings of 8 and more as an action of their own (*liked*), for a mixture
of transducers. *grid*: HSTU with interleaved tokens and full attention, and ULTRA-HSTU (merged tokens, semi-local
attention, the last half of the layers truncated), by layers and length. *ablation*: ULTRA-HSTU with one part changed,
and both with stochastic length.

Every arm learns its stream once, with the trainer's defaults but without replay, each event predicted before it is
learned from; quality is over the second half. Operations are those of the encoder in closed form (model.flops), with
attention as the mask lets through: for training, of a step's histories, forward and backward, over the interactions
that it learned from; for inference, of reading the history behind each prediction. Slopes are of a straight line
through an arm family's points, quality over operations, and exponents of one through their logarithms.

Arms that are in the results with the same settings are not run again: stopped, it goes on where it was. Writes
study-ultra.json and .png; the last line is the JSON without the arms.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.environment import environment
from benchmarks.study_stream import Arm, Stream, liked, long_range, ratings, run_arm
from kernels.host_memory import keep_freed_memory

BASE: Final[dict[str, Any]] = {"embedding_dim": 32, "num_heads": 1, "attention_dim": 32, "hidden_dim": 32}
NUM_EVENTS: Final = {"long_range": 40_000, "movietweetings": 40_000, "liked": 40_000}
QUICK_EVENTS: Final = 1_500
LAYERS: Final = {"long_range": (1, 2), "movietweetings": (1, 2, 4), "liked": (2,)}
LENGTHS: Final = {"long_range": (32, 256), "movietweetings": (16, 48, 128), "liked": (128,)}
LONGEST: Final = {stream: max(lengths) for stream, lengths in LENGTHS.items()}
MADE: Final = {"long_range": long_range, "movietweetings": ratings, "liked": liked}
DEPTH: Final = 2
"""Layers of the ablation's arms."""
QUALITY: Final = "ndcg_at_20"
PAPER: Final = {"slope_ratio_training": 5.3, "slope_ratio_inference": 21.4}
ON_DISK: Final = "study-ultra.json"


def hstu(num_layers: int, max_len: int) -> dict[str, Any]:
    """The paper's HSTU: two tokens an interaction, full attention."""
    return BASE | {"kind": "hstu", "tokens": "interleaved", "num_layers": num_layers, "max_len": max_len}


def ultra(num_layers: int, max_len: int, **changed: Any) -> dict[str, Any]:
    """ULTRA-HSTU: K1 a quarter of the length, K2 an eighth, and half of the layers on half of it."""
    return BASE | {
        "kind": "ultra_hstu",
        "num_layers": num_layers,
        "max_len": max_len,
        "local_attn_len": max_len // 4,
        "global_attn_len": max_len // 8,
        "truncated_len": max_len // 2,
        **changed,
    }


TRANSDUCERS: Final = (
    {"name": "rated", "actions": ["rated"], "max_len": 96},
    {"name": "liked", "actions": ["liked"], "max_len": 96},
)
SHORTENED: Final = {"stochastic_length_alpha": 1.6}


def arms_of(stream: str) -> list[Arm]:
    """Every arm of a stream: the cheap ones of the grid first."""
    found = []
    for max_len in LENGTHS[stream]:
        for num_layers in LAYERS[stream]:
            both = (("hstu", hstu(num_layers, max_len)), ("ultra", ultra(num_layers, max_len)))
            for family, model in both:
                name = f"{family}-{num_layers}x{max_len}"
                found.append(Arm(stream=stream, group="grid", family=family, name=name, model=model))
    alone = {"ultra": ultra(DEPTH, LONGEST[stream]), **_alone(stream)}
    found += [
        Arm(stream=stream, group="ablation", family="ultra", name=name, model=model) for name, model in alone.items()
    ]
    if stream != "liked":
        found += [
            Arm(
                stream=stream, group="ablation", family=family, name=f"{family}, shortened", model=model, loss=SHORTENED
            )
            for family, model in (
                ("hstu", hstu(DEPTH, LONGEST[stream])),
                ("ultra", ultra(DEPTH, LONGEST[stream])),
            )
        ]
    return found


def _alone(stream: str) -> dict[str, dict[str, Any]]:
    """ULTRA-HSTU with one part changed."""
    length = LONGEST[stream]

    def changed(num_layers: int = DEPTH, **settings: Any) -> dict[str, Any]:
        return ultra(num_layers, length, **settings)

    if stream == "liked":
        return {"mixture of transducers": changed(transducers=TRANSDUCERS), "items alone": changed(tokens="items")}
    found = {
        "full attention": changed(attention="full"),
        "K2 = 0": changed(global_attn_len=0),
        "relative bias": changed(relative_bias=True),
    }
    if stream == "long_range":
        return found
    return found | {
        "K1 = 0": changed(local_attn_len=0),
        "K1 = 1": changed(local_attn_len=1),
        "oldest keys": changed(global_attn="oldest_keys"),
        "no truncation": changed(truncated_layers=0),
        "interleaved tokens": changed(tokens="interleaved"),
        "items alone": changed(tokens="items"),
        "3 full": changed(3, attention="full", truncated_layers=0),
        "6 full": changed(6, attention="full", truncated_layers=0),
        "3 + 6 truncated": changed(9, attention="full", truncated_layers=6),
        "values told apart": changed(value_thresholds=(5.0, 7.0, 8.0, 9.0)),
    }


def quick_arms(stream: str) -> list[Arm]:
    """Four cheap arms of the grid and two of the ablation: that everything works."""
    arms = arms_of(stream)
    grid = [arm for arm in arms if arm.group == "grid"]
    return [*grid[:4], *(arm for arm in arms if arm.name in ("ultra", "K2 = 0"))]


def made_stream(name: str, num_events: int) -> Stream:
    """A stream by its name."""
    return MADE[name](num_events)


def fitted(rows: list[dict[str, Any]], operations: str) -> dict[str, float]:
    """Slope of quality over 1e6 operations, and exponent of its power law, through one family's points."""
    x = np.array([row[operations] for row in rows]) / 1e6
    y = np.array([row[QUALITY] for row in rows])
    slope = float(np.polyfit(x, y, 1)[0])
    exponent = float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0])
    return {"slope_per_mflop": slope, "exponent": exponent}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fits of each stream's families and their ratios; what each part of the ablation changes, in percent."""
    found: dict[str, Any] = {}
    for stream in dict.fromkeys(row["stream"] for row in rows):
        own = [row for row in rows if row["stream"] == stream]
        fits: dict[str, Any] = {}
        for kind in ("training", "inference"):
            of_family = {
                family: [row for row in own if row["group"] == "grid" and row["family"] == family]
                for family in ("hstu", "ultra")
            }
            if min(map(len, of_family.values())) < 2:
                continue
            fit = {family: fitted(points, f"{kind}_flops") for family, points in of_family.items()}
            ratios = {
                f"{name}_ratio": fit["ultra"][name] / fit["hstu"][name] for name in ("slope_per_mflop", "exponent")
            }
            fits[kind] = {**fit, **ratios}
        found[stream] = {"fits": fits, "ablation": _ablation([row for row in own if row["group"] == "ablation"])}
    return found


def _ablation(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    base = next((row for row in rows if row["name"] == "ultra"), None)
    if base is None:
        return {}
    names = [QUALITY, "hr_at_10", "training_flops", "inference_flops"]
    names += ["far_hr_at_10"] if "far_hr_at_10" in base else []
    return {
        row["name"]: {name: 100 * (row[name] / base[name] - 1) if base[name] else float("nan") for name in names}
        for row in rows
    }


def draw(rows: list[dict[str, Any]], ideals: dict[str, dict[str, float]], path: Path) -> None:
    """Quality against operations of training and of inference, a row of pictures for each stream of several lengths."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    streams = [stream for stream in dict.fromkeys(row["stream"] for row in rows) if len(LENGTHS[stream]) > 1]
    figure, all_axes = pyplot.subplots(
        len(streams), 2, figsize=(11, 4.2 * len(streams)), layout="constrained", squeeze=False
    )
    for of_stream, stream in zip(all_axes, streams, strict=True):
        for axes, kind in zip(of_stream, ("training", "inference"), strict=True):
            for family, colour in (("hstu", "#8b949e"), ("ultra", "#1f6feb")):
                own = [row for row in rows if row["stream"] == stream and row["group"] == "grid"]
                points = [row for row in own if row["family"] == family]
                x = [row[f"{kind}_flops"] for row in points]
                axes.scatter(x, [row[QUALITY] for row in points], color=colour, label=family)
                for row in points:
                    at = (row[f"{kind}_flops"], row[QUALITY])
                    axes.annotate(row["name"].split("-")[1], at, fontsize=7, xytext=(3, 3), textcoords="offset points")
            if ideal := ideals.get(stream, {}).get(QUALITY):
                axes.axhline(ideal, color="#d29922", linestyle=":", label="ideal")
            axes.set(title=stream, xlabel=f"operations of {kind}, per interaction", ylabel="NDCG@20", xscale="log")
            axes.grid(visible=True, alpha=0.25)
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def show(row: dict[str, Any]) -> None:
    far = f"{row['far_hr_at_10']:8.4f}" if "far_hr_at_10" in row else " " * 8
    print(
        f"{row['stream']:<15}{row['name']:<20}{row[QUALITY]:>8.4f}{row['hr_at_10']:>8.4f}{far}"
        f"{row['training_flops'] / 1e6:>10.2f}{row['inference_flops'] / 1e6:>10.2f}{row['cpu_s']:>8.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality against operations of HSTU and ULTRA-HSTU.")
    parser.add_argument("--streams", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--group", choices=("grid", "ablation"), help="one of the two; not given: both")
    parser.add_argument("--quick", action="store_true", help="a few arms on short streams: that everything works")
    parser.add_argument("--events", type=int, help="of each stream at most")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of what is written")
    options = parser.parse_args()
    keep_freed_memory()
    path = options.results / ON_DISK
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows: dict[str, dict[str, Any]] = {_identity(row, row["num_events"]): row for row in told.get("arms", [])}
    ideals: dict[str, dict[str, float]] = told.get("ideal", {})
    wanted: list[str] = []
    print(f"{'stream':<15}{'arm':<20}{'NDCG@20':>8}{'HR@10':>8}{'far HR':>8}{'train M':>10}{'infer M':>10}{'CPU s':>8}")
    for name in options.streams:
        num_events = options.events or (QUICK_EVENTS if options.quick else NUM_EVENTS[name])
        stream = made_stream(name, num_events)
        ideals[name] = stream.ideal
        arms = quick_arms(name) if options.quick else arms_of(name)
        for arm in arms if options.group is None else [one for one in arms if one.group == options.group]:
            identity = _identity(asdict(arm), num_events)
            wanted.append(identity)
            if identity not in rows:
                rows[identity] = {**run_arm(arm, stream), "num_events": num_events, "commit": environment()["commit"]}
                _write(path, rows, ideals)
            show(rows[identity])
    kept = [rows[one] for one in wanted]
    if options.group != "ablation" and any(len(LENGTHS[name]) > 1 for name in options.streams):
        draw(kept, ideals, path.with_suffix(".png"))
    result = {"benchmark": "study-ultra", **environment(), "paper": PAPER, "ideal": ideals, "summary": summary(kept)}
    _write(path, rows, ideals, **result)
    print(json.dumps(result))


def _identity(row: dict[str, Any], num_events: int) -> str:
    settings = [row["stream"], row["group"], row["name"], row["model"], num_events]
    return json.dumps([*settings, row["loss"]] if row.get("loss") else settings, sort_keys=True)


def _write(path: Path, rows: dict[str, dict[str, Any]], ideals: dict[str, dict[str, float]], **result: Any) -> None:
    beside = path.with_suffix(".new")
    beside.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": "study-ultra", **result, "ideal": ideals, "arms": list(rows.values())}
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    main()
