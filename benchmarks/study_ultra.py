"""ULTRA-HSTU against HSTU: quality against operations over depth and length, and each part alone.

    python benchmarks/study_ultra.py [--streams long_range movietweetings liked ml_1m] [--quick] [--data FOLDER]
                                     [--group grid] [--arms NAME ...] [--again-dirty] [--kept] [--results FOLDER]

Streams: `long_range` (backtest.long_range), simulated, where a seventh of what comes next depends on what lies
120 interactions back and more, and the ideal is known (*far HR*: of those alone); the first ratings of movietweetings,
where few histories are long; the same with ratings of 8 and more as an action of their own (*liked*), for a mixture
of transducers; and the first of MovieLens-1M (`ml_1m`, where --data has it), where most are long. *grid*: HSTU with
interleaved tokens and full attention, and ULTRA-HSTU (merged tokens, semi-local attention, the last half of the layers
truncated), by layers and length; on `ml_1m` also HSTU with merged tokens, and the ends of the grid with other seeds.
*ablation*: ULTRA-HSTU with one part changed, and with stochastic length.

Every arm learns its stream once, with the trainer's defaults but without replay, each event predicted before it is
learned from; quality is over the second half. On `ml_1m`, where nobody rates a film twice, every arm ranks among what a
user has not had at all, or longer histories would win by what they leave out (benchmarks.whole_filter). Operations are
those of the encoder in closed form (model.flops), with attention as the mask lets through: for training, of a step's
histories, forward and backward, over the interactions that it learned from; for inference, of reading the history
behind each prediction. Slopes are of a straight line through an arm family's points, quality over operations, with the
share of the variance that it explains (r2) and its standard error, and exponents of one through their logarithms;
*of_seeds*: with the ends of the grid by each seed. Ratios are told where both lines rise by two standard errors.

Arms that are in the results with the same settings are not run again: stopped, it goes on where it was. Each tells the
commit that ran it; --again-dirty runs those again that ran before their changes were committed; --kept runs none.
Writes study-ultra.json and .png; the last line is the JSON without the arms.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.environment import environment
from benchmarks.study_stream import Arm, Stream, liked, long_range, ml_1m, ratings, run_arm
from benchmarks.study_ultra_plots import draw
from kernels.host_memory import keep_freed_memory

BASE: Final[dict[str, Any]] = {"embedding_dim": 32, "num_heads": 1, "attention_dim": 32, "hidden_dim": 32}
NUM_EVENTS: Final = {"long_range": 40_000, "movietweetings": 40_000, "liked": 40_000, "ml_1m": 40_000}
QUICK_EVENTS: Final = 1_500
LAYERS: Final = {"long_range": (1, 2), "movietweetings": (1, 2, 4), "liked": (2,), "ml_1m": (1, 2, 4)}
LENGTHS: Final = {
    "long_range": (32, 256),
    "movietweetings": (16, 48, 128),
    "liked": (128,),
    "ml_1m": (32, 80, 200),
}
LONGEST: Final = {stream: max(lengths) for stream, lengths in LENGTHS.items()}
MADE: Final = {"long_range": long_range, "movietweetings": ratings, "liked": liked}
SEEDS: Final = {"ml_1m": (1,)}
"""Of the ends of the grid once more; all else has seed 0."""
THRESHOLDS: Final = {"movietweetings": (5.0, 7.0, 8.0, 9.0), "ml_1m": (2.0, 3.0, 4.0, 5.0)}
FAMILIES: Final = ("hstu", "hstu_merged", "ultra")
DEPTH: Final = 2
"""Layers of the ablation's arms."""
QUALITY: Final = "ndcg_at_20"
PAPER: Final = {"slope_ratio_training": 5.3, "slope_ratio_inference": 21.4}
ON_DISK: Final = "study-ultra.json"
DATA: Final = Path(__file__).parents[1].parent / "shared" / "data"


def hstu(num_layers: int, max_len: int) -> dict[str, Any]:
    """The paper's HSTU: two tokens an interaction, full attention."""
    return BASE | {"kind": "hstu", "tokens": "interleaved", "num_layers": num_layers, "max_len": max_len}


def hstu_merged(num_layers: int, max_len: int) -> dict[str, Any]:
    """The same with one token an interaction, which predicts from the item itself."""
    return hstu(num_layers, max_len) | {"tokens": "merged"}


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
    families = {"hstu": hstu, "ultra": ultra} | ({"hstu_merged": hstu_merged} if stream == "ml_1m" else {})
    sizes = [(num_layers, max_len) for max_len in LENGTHS[stream] for num_layers in LAYERS[stream]]
    found = [
        Arm(stream=stream, group="grid", family=family, name=f"{family}-{size[0]}x{size[1]}", model=model_of(*size))
        for size in sizes
        for family, model_of in families.items()
    ]
    ends = [arm for arm in found if (arm.model["num_layers"], arm.model["max_len"]) in (sizes[0], sizes[-1])]
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
    for seed in SEEDS.get(stream, ()):
        found += [replace(arm, name=f"{arm.name} seed {seed}", model={**arm.model, "seed": seed}) for arm in ends]
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
        "values told apart": changed(value_thresholds=THRESHOLDS[stream]),
    }


def quick_arms(stream: str) -> list[Arm]:
    """Four cheap arms of the grid and two of the ablation: that everything works."""
    arms = arms_of(stream)
    grid = [arm for arm in arms if arm.group == "grid"]
    return [*grid[:4], *(arm for arm in arms if arm.name in ("ultra", "K2 = 0"))]


def made_stream(name: str, num_events: int, data: Path) -> Stream:
    """A stream by its name; data: the folder that has ml-1m."""
    return ml_1m(num_events, data / "ml-1m") if name == "ml_1m" else MADE[name](num_events)


def fitted(rows: list[dict[str, Any]], operations: str) -> dict[str, float]:
    """Slope of quality over 1e6 operations through one family's points, the share of the variance that this explains,
    the slope's standard error, and the exponent of a power law.
    """
    x = np.array([row[operations] for row in rows]) / 1e6
    y = np.array([row[QUALITY] for row in rows])
    slope, start = np.polyfit(x, y, 1)
    left, spread = float(((y - start - slope * x) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    error = np.sqrt(left / (len(x) - 2) / ((x - x.mean()) ** 2).sum()) if len(x) > 2 else np.nan
    return {
        "slope_per_mflop": float(slope),
        "slope_error": float(error),
        "r2": 1 - left / spread if spread else float("nan"),
        "exponent": float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0]),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fits of each stream's families and their ratios; what each part of the ablation changes, in percent."""
    found: dict[str, Any] = {}
    for stream in dict.fromkeys(row["stream"] for row in rows):
        own = [row for row in rows if row["stream"] == stream]
        grid = [row for row in own if row["group"] == "grid"]
        by_seed = {seed: _of_seed(grid, seed) for seed in sorted({_seed(row) for row in grid})}
        fits = _fits(by_seed.get(0, []))
        for kind, fit in fits.items():
            fit["of_seeds"] = [_fits(points)[kind] for points in by_seed.values()] if len(by_seed) > 1 else []
        found[stream] = {
            "fits": fits,
            "seeds": _seeds(grid),
            "ablation": _ablation([row for row in own if row["group"] == "ablation"]),
        }
    return found


def _fits(grid: list[dict[str, Any]]) -> dict[str, Any]:
    fits: dict[str, Any] = {}
    of_family = {family: [row for row in grid if row["family"] == family] for family in FAMILIES}
    of_family = {family: points for family, points in of_family.items() if len(points) > 1}
    if not of_family.keys() >= {"hstu", "ultra"}:
        return fits
    for kind in ("training", "inference"):
        fit: dict[str, Any] = {family: fitted(points, f"{kind}_flops") for family, points in of_family.items()}
        for suffix, other in (("ratio", "hstu"), ("ratio_to_merged", "hstu_merged")):
            if other in fit:
                fit |= {f"{name}_{suffix}": one for name, one in _ratios(fit["ultra"], fit[other]).items()}
        fits[kind] = fit
    return fits


def _ratios(fit: dict[str, float], other: dict[str, float]) -> dict[str, float | None]:
    """None where one of the lines does not rise by two standard errors: the ratio would be one of noise."""
    rises = all(one["slope_per_mflop"] > 2 * one["slope_error"] for one in (fit, other))
    return {name: fit[name] / other[name] if rises else None for name in ("slope_per_mflop", "exponent")}


def _seed(row: dict[str, Any]) -> int:
    return int(row["model"].get("seed", 0))


def _of_seed(grid: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The grid with those points of this seed that there are, else of seed 0."""
    points = {row["name"]: row for row in grid if _seed(row) == 0}
    return list((points | {row["name"].split(" ")[0]: row for row in grid if _seed(row) == seed}).values())


def _seeds(grid: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Quality by seed, of the points that have several."""
    found: dict[str, list[float]] = {}
    for row in sorted(grid, key=_seed):
        found.setdefault(row["name"].split(" ")[0], []).append(row[QUALITY])
    return {name: several for name, several in found.items() if len(several) > 1}


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


def show(row: dict[str, Any]) -> None:
    far = f"{row['far_hr_at_10']:8.4f}" if "far_hr_at_10" in row else " " * 8
    print(
        f"{row['stream']:<15}{row['name']:<26}{row[QUALITY]:>8.4f}{row['hr_at_10']:>8.4f}{far}"
        f"{row['training_flops'] / 1e6:>10.2f}{row['inference_flops'] / 1e6:>10.2f}{row['cpu_s']:>8.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality against operations of HSTU and ULTRA-HSTU.")
    parser.add_argument("--streams", nargs="+", choices=LENGTHS, help="not given: all of which there are data")
    parser.add_argument("--group", choices=("grid", "ablation"), help="one of the two; not given: both")
    parser.add_argument("--arms", nargs="+", help="names of arms as the table has them; not given: all")
    parser.add_argument("--quick", action="store_true", help="a few arms on short streams: that everything works")
    parser.add_argument("--events", type=int, help="of each stream at most")
    parser.add_argument("--data", type=Path, default=DATA, help="folder that has ml-1m")
    parser.add_argument("--again-dirty", action="store_true", help="run arms again that ran on uncommitted changes")
    parser.add_argument("--kept", action="store_true", help="run nothing: fits and pictures of the arms that there are")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of what is written")
    options = parser.parse_args()
    has_ml_1m = (options.data / "ml-1m" / "interactions.parquet").is_file()
    if options.streams is None:
        options.streams = [name for name in LENGTHS if name != "ml_1m" or has_ml_1m or options.kept]
    elif "ml_1m" in options.streams and not (has_ml_1m or options.kept):
        parser.error(f"{options.data / 'ml-1m'} has no interactions.parquet, which the stream ml_1m reads: see --data")
    keep_freed_memory()
    here = environment()  # of the code as it was read, whatever changes in the folder meanwhile
    path = options.results / ON_DISK
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept_arms = [row for row in told.get("arms", []) if not (options.again_dirty and row["commit"].endswith("-dirty"))]
    rows: dict[str, dict[str, Any]] = {_identity(row, row["num_events"]): row for row in kept_arms}
    ideals: dict[str, dict[str, float]] = told.get("ideal", {})
    wanted: list[str] = []
    print(f"{'stream':<15}{'arm':<26}{'NDCG@20':>8}{'HR@10':>8}{'far HR':>8}{'train M':>10}{'infer M':>10}{'CPU s':>8}")
    for name in options.streams:
        num_events = options.events or (QUICK_EVENTS if options.quick else NUM_EVENTS[name])
        stream = None if options.kept else made_stream(name, num_events, options.data)
        if stream is not None:
            ideals[name] = stream.ideal
        arms = quick_arms(name) if options.quick else arms_of(name)
        for arm in arms:
            if options.group not in (None, arm.group) or (options.arms and arm.name not in options.arms):
                continue
            identity = _identity(asdict(arm), num_events)
            if options.kept and identity not in rows:
                continue
            wanted.append(identity)
            if identity not in rows:
                assert stream is not None, "nothing is left to be run under --kept"
                ran = _twin(arm, num_events, rows) or {**run_arm(arm, stream), "commit": here["commit"]}
                rows[identity] = {**ran, "num_events": num_events}
                _write(path, rows, ideals)
            show(rows[identity])
    kept = [rows[one] for one in wanted]
    drawn = dict.fromkeys(row["stream"] for row in kept if row["group"] == "grid" and len(LENGTHS[row["stream"]]) > 1)
    if drawn:
        draw(kept, {name: ideals.get(name, {}).get(QUALITY) for name in drawn}, path.with_suffix(".png"))
    commits = dict(Counter(row["commit"] for row in rows.values()))
    result = {"benchmark": "study-ultra", **here, "arms_by_commit": commits, "paper": PAPER, "ideal": ideals}
    result["summary"] = summary(kept)
    _write(path, rows, ideals, **result)
    print(json.dumps(result))


def _identity(row: dict[str, Any], num_events: int) -> str:
    settings = [row["stream"], row["group"], row["name"], row["model"], num_events]
    return json.dumps([*settings, row["loss"]] if row.get("loss") else settings, sort_keys=True)


def _twin(arm: Arm, num_events: int, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What the same model found under another name."""
    asked = json.loads(json.dumps(asdict(arm)))
    for row in rows.values():
        if row["num_events"] == num_events and all(row.get(key) == asked[key] for key in ("stream", "model", "loss")):
            return {**row, "group": arm.group, "family": arm.family, "name": arm.name}
    return None


def _write(path: Path, rows: dict[str, dict[str, Any]], ideals: dict[str, dict[str, float]], **result: Any) -> None:
    beside = path.with_suffix(".new")
    beside.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": "study-ultra", **result, "ideal": ideals, "arms": list(rows.values())}
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    main()
