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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.llatte_arms import Plan, Vectors, run_ranker, run_upstream
from benchmarks.llatte_ideal import ideal
from benchmarks.llatte_streams import Histories, Stream, films, ml1m, moods
from benchmarks.study_llatte_plots import draw
from model.config import ModelConfig
from model.llatte_config import LlatteSettings
from model.llatte_flops import ranking_flops, upstream_flops
from model.llatte_ranking_config import LlatteRankingConfig
from model.ranking_model import upstream_model_config, with_ranking_head
from model.ranking_network import RankingModelConfig
from model.upstream_config import UpstreamConfig

STALE_S: Final = {"0": 0, "1 h": 3_600, "6 h": 21_600, "1 d": 86_400}
SHORT: Final = 8
"""Ratings that the ranker reads itself."""
WIDTH: Final = 32
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
RANKER: Final = LlatteSettings(num_heads=2, latent_dim=16, head_dim=16, ffn_dim=64)
GRID: Final = {
    **{f"depth {n}": replace(BASE, num_layers=n, max_len=64) for n in (1, 2, 4)},
    **{f"length {n}": replace(BASE, num_layers=2, max_len=n) for n in (8, 32, 64, 128)},
    **{f"width {n}": replace(BASE, num_layers=2, max_len=64, embedding_dim=n, ffn_dim=2 * n) for n in (16, 32, 64)},
}
ONE_STAGE: Final = ((1, 8), (2, 8), (2, 32), (2, 64), (2, 128))
"""Layers and ratings read of rankers without vectors; the second is the ranker that reads vectors."""
CANDIDATES: Final = (8, 100)
"""Of a request, over which what they share is spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Sizes and learning rates of a stream, from a small grid over its beginning."""

    limit: int
    upstream: Plan
    ranker: Plan
    stale: tuple[str, ...]


SETTINGS: Final = {
    "moods": Setting(
        limit=80_000,
        upstream=Plan(batch=16, dense_rate=1e-3, row_rate=1e-3),
        ranker=Plan(batch=16, dense_rate=3e-4, row_rate=3e-3),
        stale=tuple(STALE_S),
    ),
    "ml-1m": Setting(
        limit=120_000,
        upstream=Plan(batch=32, dense_rate=5e-4, row_rate=1e-3),
        ranker=Plan(batch=32, dense_rate=3e-4, row_rate=3e-3),
        stale=("0",),
    ),
    "movietweetings": Setting(
        limit=40_000,
        upstream=Plan(batch=64, dense_rate=5e-4, row_rate=1e-3),
        ranker=Plan(batch=64, dense_rate=3e-4, row_rate=3e-3),
        stale=tuple(STALE_S),
    ),
}


class Study:
    """One stream, and its arms by name: each run once and kept."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.setting, self.num_seeds = name, SETTINGS[name], options.seeds
        self.limit, self.data = options.limit or self.setting.limit, options.data
        self.folder = options.work / f"{name}-{self.limit}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._streams: dict[int, Stream] = {}

    def stream(self, seed: int) -> Stream:
        """Of the simulator another one for each seed."""
        key = seed if self.name == "moods" else 0
        if key not in self._streams:
            made: dict[str, Callable[[], Stream]] = {
                "moods": lambda: moods(self.limit, seed=key),
                "ml-1m": lambda: ml1m(self.data / "ml-1m", self.limit),
                "movietweetings": lambda: films(self.limit),
            }
            self._streams[key] = made[self.name]()
        return self._streams[key]

    def arm(self, name: str, seed: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``run`` found, now or in an earlier run."""
        path = self.folder / f"{name.replace(' ', '-').replace('/', '-')}.{seed}.npz"
        if not path.is_file():
            found = run()
            unfinished = path.with_suffix(".part.npz")
            np.savez(unfinished, **found)
            unfinished.rename(path)
            said = f"{self.name} {name} ({seed})"
            print(f"{said:44s} NE {self.ne(found, seed):.4f}  {float(found['cpu_s']):6.0f} CPU s", flush=True)
        with np.load(path) as kept:
            return dict(kept)

    def upstream(self, name: str, config: UpstreamConfig, seed: int, stale: tuple[str, ...] = ()) -> dict[str, Any]:
        """An upstream model by its own heads, and its vectors."""
        plan = replace(self.setting.upstream, seed=seed)
        ages = {one: STALE_S[one] for one in stale}
        return self.arm(f"upstream {name}", seed, lambda: run_upstream(self.stream(seed), config, plan, ages))

    def ranker(
        self,
        name: str,
        seed: int,
        vectors: Vectors | None = None,
        *,
        settings: LlatteSettings = RANKER,
        max_len: int = SHORT,
    ) -> dict[str, Any]:
        """A ranker with vectors or without."""
        plan = replace(self.setting.ranker, seed=seed)
        return self.arm(
            f"ranker {name}",
            seed,
            lambda: run_ranker(self.stream(seed), settings, plan, vectors, max_len=max_len, width=WIDTH),
        )

    def late(self, arm: dict[str, Any], seed: int) -> Any:
        """Losses over the second half, in units of the base rate's entropy."""
        likes = self.stream(seed).likes
        half = len(likes) // 2
        share = likes[half:].mean()
        return arm["losses"][half:] / float(-share * math.log(share) - (1 - share) * math.log(1 - share))

    def ne(self, arm: dict[str, Any], seed: int) -> float:
        """Normalised entropy."""
        return float(self.late(arm, seed).mean())

    def mean_ne(self, arms: list[dict[str, Any]]) -> float:
        """Over seeds."""
        return float(np.mean([self.ne(arm, seed) for seed, arm in enumerate(arms)]))

    def gain(self, better: list[dict[str, Any]], than: list[dict[str, Any]]) -> dict[str, Any]:
        """How much lower NE is, in percent of the base rate's entropy, and the standard error of that."""
        pairs = [
            100 * (self.late(worse, seed) - self.late(one, seed))
            for seed, (one, worse) in enumerate(zip(better, than, strict=True))
        ]
        means = [float(one.mean()) for one in pairs]
        if len(means) > 1:
            error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
        else:
            error = float(pairs[0].std()) / math.sqrt(len(pairs[0]))
        return {"gain_percent": float(np.mean(means)), "standard_error": error, "of_seeds": means}


def vectors_of(arm: dict[str, Any], stale: str) -> Vectors:
    """What an upstream arm kept."""
    return Vectors(vector_RW=arm[f"vector {stale}"], age_s_R=arm[f"age {stale}"])


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


def ratio_of(gain: dict[str, Any], of: dict[str, Any]) -> dict[str, float] | None:
    """And its standard error; None where the denominator cannot be told from nothing, or is a loss."""
    over = of["gain_percent"]
    if over <= 2 * of["standard_error"]:
        return None
    ratio = gain["gain_percent"] / over
    if len(gain["of_seeds"]) > 1:
        # Errors of both, seed by seed, since they go together.
        left = [one - ratio * other for one, other in zip(gain["of_seeds"], of["of_seeds"], strict=True)]
        error = float(np.std(left, ddof=1)) / math.sqrt(len(left)) / over
    else:
        error = math.hypot(gain["standard_error"], ratio * of["standard_error"]) / over
    return {"ratio": ratio, "standard_error": error}


def scaling(study: Study) -> dict[str, Any]:
    """NE of upstreams over depth, width and length, with a straight line over the logarithm of their FLOPs."""
    lengths = _late_lengths(study)
    first = {config: name for name, config in reversed(GRID.items())} | {LARGE: "large"}  # some stand on several axes
    arms: dict[str, Any] = {}
    for name, config in GRID.items():
        arm = study.upstream(first[config], config, 0, study.setting.stale if config == LARGE else ())
        model = upstream_model_config(config, study.stream(0).ranking(), ("rate",))
        flops = float(upstream_flops(model, lengths.clamp(max=config.max_len)).mean())
        arms[name] = {"ne": study.ne(arm, 0), "flops": flops}
    axes = {axis: [one for name, one in arms.items() if name.startswith(axis)] for axis in ("depth", "length", "width")}
    return {"arms": arms, "fits": {axis: fitted(points) for axis, points in axes.items()}}


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
    arms = {}
    for layers in (1, 4):
        for kind in ("ids", "content"):
            settings = replace(RANKER, num_layers=layers, content=kind == "content")
            arms[kind, layers] = study.ranker(f"{kind} {layers}", 0, settings=settings, max_len=64)
    first = arms["ids", 1]
    return {
        f"{kind} {layers}": {"ne": study.ne(arm, 0), "over_ids_1": study.gain([arm], [first])}
        for (kind, layers), arm in arms.items()
    }


def one_stage(study: Study) -> dict[str, Any]:
    """FLOPs for one candidate of a ranker with vectors, and of rankers that read more themselves, with their NE."""
    lengths = _late_lengths(study)
    arms = {}
    for layers, length in ONE_STAGE:
        settings = replace(RANKER, num_layers=layers)
        name = "alone" if (layers, length) == (RANKER.num_layers, SHORT) else f"one stage {layers}x{length}"
        arm = study.ranker(name, 0, settings=settings, max_len=length)
        arms[f"{layers}x{length}"] = {"ne": study.ne(arm, 0), **_ranking_flops(study, settings, length, lengths)}
    large = study.upstream("large", LARGE, 0, study.setting.stale)
    with_large = study.ranker("large 0", 0, vectors_of(large, "0"))
    both = {"ne": study.ne(with_large, 0), **_ranking_flops(study, RANKER, SHORT, lengths)}
    model = upstream_model_config(LARGE, study.stream(0).ranking(), ("rate",))
    both["upstream_flops_per_vector"] = float(upstream_flops(model, lengths.clamp(max=LARGE.max_len)).mean())
    equal = [name for name, one in arms.items() if one["ne"] <= both["ne"]]
    return {"one_stage": arms, "two_stages": both, "as_good": equal}


def _late_lengths(study: Study) -> torch.Tensor:
    """int64[R'] of the requests in the second half: ratings before each."""
    stream = study.stream(0)
    lengths = Histories(stream).lengths(1 << 30)[stream.offsets[:-1] >= len(stream.user) // 2]
    return torch.from_numpy(lengths)


def _ranking_flops(study: Study, settings: LlatteSettings, max_len: int, lengths: torch.Tensor) -> dict[str, float]:
    base = ModelConfig(embedding_dim=WIDTH, max_len=max_len)
    model = with_ranking_head(base, study.stream(0).ranking(), ("rate",), settings, upstream_width=BASE.width)
    assert isinstance(model, RankingModelConfig)
    assert isinstance(model.ranking, LlatteRankingConfig)
    flops = ranking_flops(model, model.ranking, lengths.clamp(max=max_len))
    return {f"flops_of_{n}": float(flops.each(n).mean()) for n in CANDIDATES}


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
        print(f"{name}: {axis}: {fit['alpha']:+.3f} % of NE less a decade of FLOPs, R2 {fit['r2']:.2f}")


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
    parser.add_argument("--seeds", type=int, default=3, help="of the arms of `transfer`")
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
