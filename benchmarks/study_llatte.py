"""What the two stages of LLaTTE bring on a stream: how much of the upstream's gain reaches the ranker, how stale its
vectors may be, what a model of one stage takes for the same.

    python benchmarks/study_llatte.py [--quick] [--streams moods ml-1m movietweetings] [--parts transfer flops ...]
                                      [--seeds 3] [--limit N] [--work folder] [--results file.json] [--plots folder]

Streams: `moods` (simulated, ``backtest.moods``: the best that anybody can do is known), `ml-1m` (MovieLens-1M, where
--data has it: long histories) and `movietweetings` (ships with headrace, short ones). One pass; every rating is
predicted before it is learned from, and NE (log loss over that of the base rate) is over the second half. *Upstream*:
`UpstreamModel` of some depth, width and length. *Ranker*: LLaTTE's, with the 8 newest ratings of a user and a vector of
an upstream worked out from what had happened some time before.

Gains are differences of NE in percent. Standard errors are of paired differences: over seeds where there are several
(of weights, and of the simulated stream), else over ratings, which leaves out what another seed would change. The
transfer ratio is the ranker's gain from a larger upstream over that upstream's own, where that is above two standard
errors. Arms are kept in --work as they end, so a run that is interrupted goes on. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.llatte_ideal import ideal
from benchmarks.llatte_kept import (
    RANKER,
    SETTINGS,
    SHORT,
    STALE_S,
    WIDTH,
    Study,
    ratio_of,
    standard_error,
    vectors_of,
)
from benchmarks.llatte_streams import Histories
from benchmarks.study_llatte_plots import draw
from model.config import ModelConfig
from model.llatte_config import LlatteSettings
from model.llatte_flops import ranking_flops, upstream_flops
from model.llatte_ranking_config import LlatteRankingConfig
from model.ranking_model import upstream_model_config, with_ranking_head
from model.ranking_network import RankingModelConfig
from model.upstream_config import UpstreamConfig

BASE: Final = UpstreamConfig(
    width=32,
    embedding_dim=WIDTH,
    num_layers=1,
    max_len=SHORT,
    num_heads=2,
    latent_dim=16,
    head_dim=16,
    ffn_dim=64,
    num_queries=4,
    readout_rank=32,
    next_item_weight=0.0,
)
LARGE: Final = replace(BASE, num_layers=2, max_len=128)
GRID: Final = {
    **{f"depth {n}": replace(BASE, num_layers=n, max_len=64) for n in (1, 2, 4)},
    **{f"length {n}": replace(BASE, num_layers=2, max_len=n) for n in (8, 32, 64, 128)},
    **{f"width {n}": replace(BASE, num_layers=2, max_len=64, embedding_dim=n, ffn_dim=2 * n) for n in (16, 32, 64)},
}
ONE_STAGE: Final = ((1, 8), (2, 8), (2, 32), (2, 64), (2, 128))
"""Layers and ratings read of rankers without vectors; the second is the ranker that reads vectors."""
CANDIDATES: Final = (8, 100)
"""Of a request, over which what they share is spread."""


def transfer(study: Study) -> dict[str, Any]:
    """Gains of a larger upstream, its own and the ranker's, and what is left of them as vectors grow old."""
    seeds, stale = range(study.num_seeds), study.setting.stale
    base = [study.upstream("small", BASE, seed, ("0",)) for seed in seeds]
    large = [study.upstream("large", LARGE, seed, stale) for seed in seeds]
    alone = [study.ranker("alone", seed) for seed in seeds]
    with_base = [study.ranker("small 0", seed, vectors_of(base[seed], "0")) for seed in seeds]
    own = study.gain(large, base)
    found: dict[str, Any] = {
        "ne": {
            "upstream small": study.mean_ne(base),
            "upstream large": study.mean_ne(large),
            "ranker alone": study.mean_ne(alone),
            "ranker with small": study.mean_ne(with_base),
        },
        "upstream_large_over_small": own,
        "small_over_alone": study.gain(with_base, alone),
        "stale": {},
    }
    for one in stale:
        with_large = [study.ranker(f"large {one}", seed, vectors_of(large[seed], one)) for seed in seeds]
        over_small = study.gain(with_large, with_base)
        found["stale"][one] = {
            "seconds": STALE_S[one],
            "ne": study.mean_ne(with_large),
            "over_alone": study.gain(with_large, alone),
            "over_small": over_small,
            "transfer_ratio": ratio_of(over_small, own),
        }
    return found


def scaling(study: Study) -> dict[str, Any]:
    """NE of upstreams over depth, width and length, with a straight line over the logarithm of their FLOPs: one for
    each seed, since what a seed changes moves the points of an axis together.
    """
    seeds = range(study.num_seeds)
    first = {config: name for name, config in reversed(GRID.items())} | {LARGE: "large"}  # some stand on several axes
    found: dict[str, list[dict[str, Any]]] = {}
    arms: dict[str, Any] = {}
    for name, config in GRID.items():
        stale = study.setting.stale if config == LARGE else ()
        found[name] = [study.upstream(first[config], config, seed, stale) for seed in seeds]
        smallest = found[next(other for other in GRID if other.split()[0] == name.split()[0])]
        flops = float(np.mean([_upstream_flops(study, config, seed) for seed in seeds]))
        over = study.gain(found[name], smallest)
        arms[name] = {"ne": study.mean_ne(found[name]), "flops": flops, "over_smallest": over}
    fits = {}
    for axis in ("depth", "length", "width"):
        names = [name for name in GRID if name.startswith(axis)]
        lines = [
            fitted([{"ne": study.ne(found[name][seed], seed), "flops": arms[name]["flops"]} for name in names])
            for seed in seeds
        ]
        alphas = [line["alpha"] for line in lines]
        fits[axis] = {
            **fitted([arms[name] for name in names]),
            "alpha_standard_error": standard_error(alphas) if len(alphas) > 1 else None,
            "alpha_of_seeds": alphas,
        }
    return {"arms": arms, "fits": fits}


def fitted(points: list[dict[str, Any]]) -> dict[str, float]:
    """``NE in percent = intercept - alpha * log10 FLOPs`` (LLaTTE, section 5), and how much of it the line explains."""
    x, y = np.log10([one["flops"] for one in points]), np.array([100 * one["ne"] for one in points])
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - slope * x - intercept) ** 2).sum())
    return {"alpha": -float(slope), "r2": 1 - left / spread if spread else math.nan, "points": len(points)}


def depth_with_content(study: Study) -> dict[str, Any] | None:
    """Rankers without vectors, over ids alone and with content, of one layer and four; None without content."""
    if study.stream(0).content is None:
        return None
    arms = {
        (kind, layers): [
            study.ranker(
                f"{kind} {layers}",
                seed,
                settings=replace(RANKER, num_layers=layers, content=kind == "content"),
                max_len=64,
            )
            for seed in range(study.num_seeds)
        ]
        for layers in (1, 4)
        for kind in ("ids", "content")
    }
    shares = [float(study.is_new(seed).mean()) for seed in range(study.num_seeds)]
    found: dict[str, Any] = {"share_of_new_items": float(np.mean(shares))}
    for (kind, layers), arm in arms.items():
        found[f"{kind} {layers}"] = {
            "ne": study.mean_ne(arm),
            "over_ids_1": study.gain(arm, arms["ids", 1]),
            "over_ids": study.gain(arm, arms["ids", layers]),
            "over_ids_of_new_items": study.gain(arm, arms["ids", layers], new_items=True),
            "over_1_layer": study.gain(arm, arms[kind, 1]),
        }
    return found


def one_stage(study: Study) -> dict[str, Any]:
    """FLOPs for one candidate of a ranker with vectors, and of rankers that read more themselves, with their NE."""
    seeds = range(study.num_seeds)
    large = [study.upstream("large", LARGE, seed, study.setting.stale) for seed in seeds]
    with_large = [study.ranker("large 0", seed, vectors_of(large[seed], "0")) for seed in seeds]
    arms: dict[str, dict[str, Any]] = {}
    for layers, length in ONE_STAGE:
        settings = replace(RANKER, num_layers=layers)
        name = "alone" if (layers, length) == (RANKER.num_layers, SHORT) else f"one stage {layers}x{length}"
        arm = [study.ranker(name, seed, settings=settings, max_len=length) for seed in seeds]
        arms[f"{layers}x{length}"] = {
            "ne": study.mean_ne(arm),
            "over_two_stages": study.gain(arm, with_large),
            **_ranking_flops(study, settings, length),
        }
    both = {"ne": study.mean_ne(with_large), **_ranking_flops(study, RANKER, SHORT)}
    both["upstream_flops_per_vector"] = float(np.mean([_upstream_flops(study, LARGE, seed) for seed in seeds]))
    equal = [name for name, one in arms.items() if one["over_two_stages"]["gain_percent"] >= 0]
    return {"one_stage": arms, "two_stages": both, "as_good": equal}


def _late_lengths(study: Study, seed: int) -> torch.Tensor:
    """int64[R'] of the requests in the second half: ratings before each."""
    stream = study.stream(seed)
    lengths = Histories(stream).lengths(1 << 30)[stream.offsets[:-1] >= len(stream.user) // 2]
    return torch.from_numpy(lengths)


def _upstream_flops(study: Study, config: UpstreamConfig, seed: int) -> float:
    model = upstream_model_config(config, study.stream(seed).ranking(), ("rate",))
    return float(upstream_flops(model, _late_lengths(study, seed).clamp(max=config.max_len)).mean())


def _ranking_flops(study: Study, settings: LlatteSettings, max_len: int) -> dict[str, float]:
    """Means over requests and seeds."""
    base = ModelConfig(embedding_dim=WIDTH, max_len=max_len)
    model = with_ranking_head(base, study.stream(0).ranking(), ("rate",), settings, upstream_width=BASE.width)
    assert isinstance(model, RankingModelConfig)
    assert isinstance(model.ranking, LlatteRankingConfig)
    of_seeds = [
        ranking_flops(model, model.ranking, _late_lengths(study, seed).clamp(max=max_len))
        for seed in range(study.num_seeds)
    ]
    return {f"flops_of_{n}": float(np.mean([float(one.each(n).mean()) for one in of_seeds])) for n in CANDIDATES}


def best_possible(study: Study) -> dict[str, Any] | None:
    """NE of the exact forecast from so many ratings, and from the newest 8 with older ones; None for real streams."""
    stream = study.stream(0)
    return None if stream.simulated is None else ideal(stream, short=SHORT, long=LARGE.max_len, stale_s=STALE_S)


PARTS: Final[dict[str, Callable[[Study], Any]]] = {
    "ideal": best_possible,
    "transfer": transfer,
    "flops": one_stage,
    "scaling": scaling,
    "content": depth_with_content,
}


def report(name: str, found: dict[str, Any]) -> None:
    """A few lines for people."""
    for stale, one in found.get("transfer", {}).get("stale", {}).items():
        ratio = "none"
        if one["transfer_ratio"] is not None:
            ratio = f"{one['transfer_ratio']['ratio']:.2f} ± {one['transfer_ratio']['standard_error']:.2f}"
        print(f"{name}: vectors {stale:>3s} old: NE {one['ne']:.4f}  transfer ratio {ratio}")
    for axis, fit in found.get("scaling", {}).get("fits", {}).items():
        error = "" if fit["alpha_standard_error"] is None else f" ± {fit['alpha_standard_error']:.2f}"
        print(f"{name}: {axis}: {fit['alpha']:+.2f}{error} % of NE less a decade of FLOPs, R2 {fit['r2']:.2f}")


def kept_streams(path: Path | None) -> dict[str, Any]:
    """Of the results that are written anew: parts and streams that this run leaves out stay as they are."""
    if path is None or not path.is_file():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8")).get("streams", {})
    return {name: found for name, found in kept.items() if name in SETTINGS}


def main() -> None:
    parser = argparse.ArgumentParser(description="LLaTTE's two stages on a stream")
    parser.add_argument("--quick", action="store_true", help="640 ratings: whether it runs, not what it says")
    parser.add_argument("--streams", nargs="+", choices=SETTINGS)
    parser.add_argument("--limit", type=int, help="ratings; by default those of each stream's setting")
    parser.add_argument("--seeds", type=int, default=3, help="of every arm, and of the simulated stream")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1].parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("var/study-llatte"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--plots", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.limit, options.seeds = 640, 2
    if options.streams is None:
        options.streams = ["moods", *(["ml-1m"] if (options.data / "ml-1m").is_dir() else [])]
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "study-llatte", **environment(), "streams": kept_streams(options.results)}
    for name in options.streams:
        study = Study(name, options)
        found = {part: PARTS[part](study) for part in options.parts}
        before = result["streams"].get(name, {})
        if before.get("ratings") != study.limit:
            before = {}
        result["streams"][name] = {**before, "ratings": study.limit, "seeds": options.seeds, **found}
        report(name, found)
    if options.plots:
        draw(result, options.plots)
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
