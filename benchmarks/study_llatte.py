"""What the two stages of LLaTTE bring on a stream: how much of the upstream's gain reaches the ranker, and how stale
its vectors may be.

    python benchmarks/study_llatte.py [--quick] [--limit 40000] [--parts transfer content scaling] [--work folder]
                                      [--results file.json] [--plots folder]

movietweetings in order, one pass. The task is whether a rating is 8 or more; every rating is predicted before it is
learned from, and NE (log loss over that of the base rate) is over the second half. *Upstream*: `UpstreamModel` of some
depth, width and length. *Ranker*: LLaTTE's, with the 4 newest ratings of a user and a vector of an upstream worked out
from what had happened some time before. Gains are differences of NE in percent, with standard errors of paired
differences. The transfer ratio is the ranker's gain from a larger upstream over that upstream's own, where that is
above two standard errors. Arms are kept in --work as they end, so a run that is interrupted goes on. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from backtest.datasets import movietweetings
from benchmarks.environment import environment
from benchmarks.study_llatte_plots import draw
from model.config import ModelConfig, OptimizerConfig
from model.llatte_config import LlatteConfig, LlatteSettings
from model.optimizer import RecommenderOptimizer
from model.ranking_learning import ShownBatch, ranking_pass
from model.ranking_model import upstream_model_config, with_ranking_head
from model.ranking_settings import RankingSettings
from model.recommender import Recommender
from model.upstream_config import UpstreamConfig
from model.upstream_input import UpstreamVectors
from model.upstream_model import UpstreamExamples, UpstreamModel, UserBatch
from online_trainer.item_content import content_vector
from online_trainer.text_content import hashed_ngrams

Int64s = NDArray[np.int64]
TASK: Final = "value>=8"
RANKING: Final = RankingSettings(kind="llatte", tasks=(TASK,), learn_from="interactions", value_thresholds=(5, 7, 8, 9))
STALE_S: Final = {"0": 0, "1 h": 3_600, "6 h": 21_600, "1 d": 86_400, "7 d": 604_800}
BASE: Final = UpstreamConfig(
    width=32, embedding_dim=32, num_layers=1, max_len=4, num_heads=2, latent_dim=16, head_dim=16, ffn_dim=64
)
LARGE: Final = replace(BASE, num_layers=4, max_len=128)
GRID: Final = {
    **{f"depth {n}": replace(BASE, num_layers=n, max_len=64) for n in (1, 2, 4)},
    **{f"length {n}": replace(BASE, num_layers=2, max_len=n) for n in (4, 16, 64, 256)},
    **{f"width {n}": replace(BASE, num_layers=2, max_len=64, embedding_dim=n, ffn_dim=2 * n) for n in (16, 32, 64)},
}
SHORT: Final = 4
"""Ratings that the ranker reads itself."""


@dataclass(frozen=True)
class Stream:
    """N ratings in order of time. before: of each rating, its user's earlier ones as places in the stream."""

    user: Int64s
    item: Int64s
    time_ms: Int64s
    value: NDArray[np.float32]
    before: list[Int64s]

    def histories(self, rows: Int64s, *, max_len: int, stale_ms: int = 0) -> tuple[Int64s, Int64s]:
        """Places of what each row's user had rated strictly before it, and before stale_ms earlier; and offsets."""
        parts = []
        for row in rows.tolist():
            places = self.before[row]
            end = int(np.searchsorted(self.time_ms[places], self.time_ms[row] - stale_ms, side="left"))
            parts.append(places[max(end - max_len, 0) : end])
        return np.concatenate([np.zeros(0, np.int64), *parts]), np.cumsum([0, *(len(part) for part in parts)])


def read_stream(limit: int) -> Stream:
    rows = pl.read_parquet(movietweetings().interactions).sort("timestamp", maintain_order=True).head(limit)
    user, item, time_s = (rows[name].cast(pl.Int64).to_numpy() for name in ("user_id", "item_id", "timestamp"))
    value = rows["rating"].cast(pl.Float32).to_numpy()
    return Stream(user, item, time_s * 1000, value, _before(user))


def _before(user: Int64s) -> list[Int64s]:
    seen: dict[int, list[int]] = {}
    before = []
    for place, one in enumerate(user.tolist()):
        earlier = seen.setdefault(one, [])
        before.append(np.array(earlier, np.int64))
        earlier.append(place)
    return before


def read_content(path: Path, items: Int64s) -> NDArray[np.float32] | None:
    """float32[V, C] of these items: genres, decade and title; None where the file is not there."""
    if not path.is_file():
        return None
    found = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            item_id, title, genres = line.rstrip("\n").split("::")
            kinds = [*(genre for genre in genres.split("|") if genre), f"decade {title.rstrip()[-5:-2]}"]
            found[int(item_id)] = content_vector(None, kinds, hashed_ngrams(title))
    nothing = np.zeros(64, np.float32)
    return np.stack([nothing if (one := found.get(item)) is None else one for item in items.tolist()])


def steps_of(stream: Stream, size: int) -> list[Int64s]:
    return [np.arange(first, min(first + size, len(stream.user))) for first in range(0, len(stream.user), size)]


def losses_of(logits: Tensor, stream: Stream, rows: Int64s) -> NDArray[np.float64]:
    likes = torch.from_numpy((stream.value[rows] >= 8).astype(np.float64))
    found = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0].double(), likes, reduction="none")
    return found.numpy()


def inputs_of(stream: Stream, places: Int64s, offsets: Int64s, table: Any) -> dict[str, Any]:
    return {
        "rows_L": torch.from_numpy(table.lookup(stream.item[places])),
        "actions_L": torch.ones(len(places), dtype=torch.int64),
        "values_L": torch.from_numpy(stream.value[places]),
        "timestamps_ms_L": torch.from_numpy(stream.time_ms[places]),
        "offsets": torch.from_numpy(offsets),
    }


def run_upstream(stream: Stream, config: UpstreamConfig, size: int, stale: dict[str, int]) -> dict[str, Any]:
    """Losses of every rating, and each user's vector as it was then, made of what had happened some time before."""
    model = UpstreamModel(upstream_model_config(config, RANKING, ("rate",)))
    optimizer = RecommenderOptimizer(model, OptimizerConfig())
    generator, losses, started_s = torch.Generator().manual_seed(0), [], time.process_time()
    vectors: dict[str, list[NDArray[np.float32]]] = {name: [] for name in stale}
    ages: dict[str, list[NDArray[np.float32]]] = {name: [] for name in stale}
    learning_s = 0.0
    for rows in steps_of(stream, size):
        for name, stale_s in stale.items():
            places, offsets = stream.histories(rows, max_len=config.max_len, stale_ms=1000 * stale_s)
            has_any = np.diff(offsets) > 0
            as_of_ms = stream.time_ms[rows]
            as_of_ms[has_any] = stream.time_ms[places[offsets[1:][has_any] - 1]]
            users = UserBatch(**inputs_of(stream, places, offsets, model.items), as_of_ms_B=torch.from_numpy(as_of_ms))
            vectors[name].append(model.user_vectors(users).numpy())
            age_s = np.where(has_any, (stream.time_ms[rows] - as_of_ms) / 1000, np.nan)
            ages[name].append(age_s.astype(np.float32))
        began_s = time.process_time()
        model.items.admit(stream.item[rows])
        places, offsets = stream.histories(rows, max_len=config.max_len)
        labels = model.heads.labels(torch.ones(len(rows), dtype=torch.int64), torch.from_numpy(stream.value[rows]))
        shown = ShownBatch(
            **inputs_of(stream, places, offsets, model.items),
            shown_rows_C=torch.from_numpy(model.items.lookup(stream.item[rows])),
            shown_at_ms_R=torch.from_numpy(stream.time_ms[rows]),
            shown_offsets=torch.arange(len(rows) + 1),
        )
        examples = UpstreamExamples.of_shown(shown, labels, torch.ones(len(rows), dtype=torch.bool))
        step = model.learning_pass(examples, generator=generator)
        losses.append(losses_of(step.predictions_CK, stream, rows))
        step.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(step.active)
        known = model.items.lookup(stream.item[rows])
        model.items.observe(known, stream.time_ms[rows])
        learning_s += time.process_time() - began_s
    return {
        "losses": np.concatenate(losses),
        "cpu_s": np.array(time.process_time() - started_s),
        "learning_cpu_s": np.array(learning_s),
        **{f"vector {name}": np.concatenate(parts) for name, parts in vectors.items()},
        **{f"age {name}": np.concatenate(parts) for name, parts in ages.items()},
    }


def run_ranker(
    stream: Stream,
    size: int,
    settings: LlatteSettings,
    vectors: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    *,
    content: tuple[Int64s, NDArray[np.float32]] | None = None,
    max_len: int = SHORT,
) -> dict[str, Any]:
    """Losses of every rating by a ranker with vectors and ages of each, or without any."""
    width = 32 if vectors is None else vectors[0].shape[1]
    base = ModelConfig(embedding_dim=32, max_len=max_len)
    model = Recommender(with_ranking_head(base, RANKING, ("rate",), settings, upstream_width=width))
    assert model.ranking is not None
    rates = OptimizerConfig(dense_learning_rate=1e-3, row_learning_rate=1e-2)
    optimizer = RecommenderOptimizer(model, rates, parameters=model.ranking_parameters())
    generator, losses, started_s = torch.Generator().manual_seed(0), [], time.process_time()
    for rows in steps_of(stream, size):
        admitted = model.items.admit(stream.item[rows])
        if content is not None:
            model.items.describe(admitted, content[1][np.searchsorted(content[0], stream.item[rows])])
        places, offsets = stream.histories(rows, max_len=max_len)
        upstream = None
        if vectors is not None:
            upstream = UpstreamVectors(
                vector_BW=torch.from_numpy(vectors[0][rows]), age_s_B=torch.from_numpy(vectors[1][rows])
            )
        shown = ShownBatch(
            **inputs_of(stream, places, offsets, model.items),
            shown_rows_C=torch.from_numpy(admitted),
            shown_at_ms_R=torch.from_numpy(stream.time_ms[rows]),
            shown_offsets=torch.arange(len(rows) + 1),
            upstream=upstream,
        )
        labels = model.ranking.heads.labels(
            torch.ones(len(rows), dtype=torch.int64), torch.from_numpy(stream.value[rows])
        )
        step = ranking_pass(model, shown, labels, generator=generator)
        losses.append(losses_of(step.predictions_CK, stream, rows))
        step.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(step.active)
    return {"losses": np.concatenate(losses), "cpu_s": np.array(time.process_time() - started_s)}


def flops_of(network: LlatteConfig, length: float) -> float:
    """Multiply-adds times two of the layers, forward, for one user with so many interactions to read.

    Per layer: latents of all tokens it reads; of the tokens it computes, queries, attention over half of what is read
    (causal), the output map and the feed-forward part.
    """
    total, tokens = 0.0, min(length, network.max_len) + network.num_queries
    latent, wide = network.latent_dim, network.num_heads * network.latent_dim
    for kept in network.kept_lens():
        computed = min(tokens, kept + network.num_queries)
        total += 2 * tokens * network.width * latent
        total += 2 * computed * (network.width * latent + latent * wide + wide * network.width)
        total += 2 * 2 * computed * tokens * wide * (0.5 if computed == tokens else 1.0)
        total += 2 * computed * 2 * network.width * network.ffn_dim
        tokens = computed
    return total


class Study:
    """Arms by name, each run once and kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.stream = options, read_stream(options.limit)
        self.folder = options.work / f"{options.limit}-{options.batch}"
        self.folder.mkdir(parents=True, exist_ok=True)
        half = len(self.stream.user) // 2
        likes = (self.stream.value[half:] >= 8).mean()
        self.entropy = float(-likes * math.log(likes) - (1 - likes) * math.log(1 - likes))
        self.half = half

    def arm(self, name: str, run: Any) -> dict[str, Any]:
        path = self.folder / f"{name.replace(' ', '-').replace('/', '-')}.npz"
        if not path.is_file():
            found = run()
            unfinished = path.with_suffix(".part.npz")
            np.savez(unfinished, **found)
            unfinished.rename(path)
            print(f"{name:34s} NE {self.ne(found):.4f}  {float(found['cpu_s']):6.0f} CPU s", flush=True)
        with np.load(path) as kept:
            return dict(kept)

    def ne(self, arm: dict[str, Any]) -> float:
        return float(arm["losses"][self.half :].mean() / self.entropy)

    def gain(self, better: dict[str, Any], than: dict[str, Any]) -> dict[str, float]:
        """How much lower NE is, in percent of the base rate's entropy, and the standard error of that."""
        paired = (than["losses"] - better["losses"])[self.half :] / self.entropy * 100
        return {"gain_percent": float(paired.mean()), "standard_error": float(paired.std() / math.sqrt(len(paired)))}


def transfer(study: Study) -> dict[str, Any]:
    """Gains of a larger upstream, its own and the ranker's, and what is left of them as vectors grow old."""
    stream, size, short = study.stream, study.options.batch, LlatteSettings(num_heads=2, latent_dim=16, ffn_dim=64)

    def upstream(name: str, config: UpstreamConfig) -> dict[str, Any]:
        return study.arm(f"upstream {name}", lambda: run_upstream(stream, config, size, STALE_S))

    def ranker(vectors: dict[str, Any] | None, name: str, stale: str) -> dict[str, Any]:
        held = None if vectors is None else (vectors[f"vector {stale}"], vectors[f"age {stale}"])
        return study.arm(f"ranker {name}", lambda: run_ranker(stream, size, short, held))

    base, large = upstream("small", BASE), upstream("large", LARGE)
    alone, with_base = ranker(None, "alone", "0"), ranker(base, "small 0", "0")
    found: dict[str, Any] = {
        "ne": {"upstream small": study.ne(base), "upstream large": study.ne(large), "ranker alone": study.ne(alone)},
        "upstream_large_over_small": study.gain(large, base),
        "stale": {},
    }
    for stale, seconds in STALE_S.items():
        with_large = ranker(large, f"large {stale}", stale)
        over_base = study.gain(with_large, with_base)
        found["stale"][stale] = {
            "seconds": seconds,
            "ne": study.ne(with_large),
            "over_alone": study.gain(with_large, alone),
            "over_small": over_base,
            "transfer_ratio": ratio_of(over_base, found["upstream_large_over_small"]),
        }
    return found


def ratio_of(gain: dict[str, float], of: dict[str, float]) -> float | None:
    """None where the denominator cannot be told from nothing, or is a loss."""
    if of["gain_percent"] <= 2 * of["standard_error"]:
        return None
    return gain["gain_percent"] / of["gain_percent"]


def scaling(study: Study) -> dict[str, Any]:
    """NE of upstreams over depth, width and length, with a straight line over the logarithm of their FLOPs."""
    stream, size = study.stream, study.options.batch
    lengths = np.array([len(places) for places in stream.before[study.half :]])
    arms: dict[str, Any] = {}
    first = {config: name for name, config in reversed(GRID.items())}  # some stand on several axes
    for name, config in GRID.items():
        arm = study.arm(f"upstream {first[config]}", lambda config=config: run_upstream(stream, config, size, {}))
        mean_len = float(np.minimum(lengths, config.max_len).mean())
        arms[name] = {"ne": study.ne(arm), "flops": flops_of(config.network(), mean_len), "mean_len": mean_len}
    fits = {}
    for axis in ("depth", "length", "width"):
        points = [(one["flops"], one["ne"]) for name, one in arms.items() if name.startswith(axis)]
        slope, _ = np.polyfit(np.log10([flops for flops, _ in points]), [100 * ne for _, ne in points], 1)
        fits[axis] = {"ne_percent_per_decade": float(slope)}
    return {"arms": arms, "fits": fits}


def depth_with_content(study: Study) -> dict[str, Any] | None:
    """Rankers without vectors, over ids alone and with content, of one layer and four."""
    items = np.unique(study.stream.item)
    vectors = read_content(study.options.data / "movietweetings" / "movies.dat.gz", items)
    if vectors is None:
        return None
    arms = {}
    for layers in (1, 4):
        for kind in ("ids", "content"):
            settings = LlatteSettings(
                num_layers=layers, num_heads=2, latent_dim=16, ffn_dim=64, content=kind == "content"
            )
            content = (items, vectors) if kind == "content" else None
            arms[kind, layers] = study.arm(
                f"content {kind} {layers}",
                lambda settings=settings, content=content: run_ranker(
                    study.stream, study.options.batch, settings, None, content=content, max_len=64
                ),
            )
    first = arms["ids", 1]
    return {
        f"{kind} {layers}": {"ne": study.ne(arm), "over_ids_1": study.gain(arm, first)}
        for (kind, layers), arm in arms.items()
    }


PARTS: Final = {"transfer": transfer, "content": depth_with_content, "scaling": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description="LLaTTE's two stages on movietweetings")
    parser.add_argument("--quick", action="store_true", help="400 ratings: whether it runs, not what it says")
    parser.add_argument("--limit", type=int, default=40_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1].parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("var/study-llatte"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--plots", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.limit, options.batch = 400, 100
    torch.set_num_threads(1)
    study = Study(options)
    result: dict[str, Any] = {
        "benchmark": "study-llatte",
        "stream": "movietweetings",
        "limit": options.limit,
        "batch": options.batch,
    }
    result |= environment() | {part: PARTS[part](study) for part in options.parts}
    for stale, one in result.get("transfer", {}).get("stale", {}).items():
        ratio = "none" if one["transfer_ratio"] is None else f"{one['transfer_ratio']:.2f}"
        print(f"vector {stale:>5s} old: NE {one['ne']:.4f}  transfer ratio {ratio}")
    if options.plots:
        draw(result, options.plots)
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
