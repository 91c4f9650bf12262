"""Arms of the LLaTTE study that are kept as they end, by stream, name and seed; NE, gains and their standard errors."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.llatte_arms import Plan, Vectors, run_ranker, run_upstream
from benchmarks.llatte_streams import Stream, films, ml1m, moods
from model.llatte_config import LlatteSettings
from model.upstream_config import UpstreamConfig

STALE_S: Final = {"0": 0, "1 h": 3_600, "6 h": 21_600, "1 d": 86_400}
SHORT: Final = 8
"""Ratings that the ranker reads itself."""
WIDTH: Final = 32
NEW_BELOW: Final = 10
"""Ratings, below which an item is new."""
RANKER: Final = LlatteSettings(num_heads=2, latent_dim=16, head_dim=16, ffn_dim=64)


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

    def is_new(self, seed: int) -> NDArray[np.bool_]:
        """bool, of each rating of the second half: its item had less than NEW_BELOW ratings before."""
        items = self.stream(seed).item
        order = np.argsort(items, kind="stable")
        runs = np.flatnonzero(np.diff(items[order], prepend=-1))
        earlier = np.empty(len(items), np.int64)
        earlier[order] = np.arange(len(items)) - np.repeat(runs, np.diff(np.append(runs, len(items))))
        return earlier[len(items) // 2 :] < NEW_BELOW

    def ne(self, arm: dict[str, Any], seed: int) -> float:
        """Normalised entropy."""
        return float(self.late(arm, seed).mean())

    def mean_ne(self, arms: list[dict[str, Any]]) -> float:
        """Over seeds."""
        return float(np.mean([self.ne(arm, seed) for seed, arm in enumerate(arms)]))

    def gain(
        self, better: list[dict[str, Any]], than: list[dict[str, Any]], *, new_items: bool = False
    ) -> dict[str, Any]:
        """How much lower NE is, in percent of the base rate's entropy, and the standard error of that."""
        pairs = [
            100 * (self.late(worse, seed) - self.late(one, seed))[self.is_new(seed) if new_items else slice(None)]
            for seed, (one, worse) in enumerate(zip(better, than, strict=True))
        ]
        means = [float(one.mean()) for one in pairs]
        error = standard_error(means) if len(means) > 1 else float(pairs[0].std()) / math.sqrt(len(pairs[0]))
        return {"gain_percent": float(np.mean(means)), "standard_error": error, "of_seeds": means}


def standard_error(of_seeds: list[float]) -> float:
    """Of the mean of two or more."""
    return float(np.std(of_seeds, ddof=1)) / math.sqrt(len(of_seeds))


def vectors_of(arm: dict[str, Any], stale: str) -> Vectors:
    """What an upstream arm kept."""
    return Vectors(vector_RW=arm[f"vector {stale}"], age_s_R=arm[f"age {stale}"])


def ratio_of(gain: dict[str, Any], of: dict[str, Any]) -> dict[str, float] | None:
    """And its standard error; None where the denominator cannot be told from nothing, or is a loss."""
    over = of["gain_percent"]
    if over <= 2 * of["standard_error"]:
        return None
    ratio = gain["gain_percent"] / over
    if len(gain["of_seeds"]) > 1:
        # Errors of both, seed by seed, since they go together.
        left = [one - ratio * other for one, other in zip(gain["of_seeds"], of["of_seeds"], strict=True)]
        error = standard_error(left) / over
    else:
        error = math.hypot(gain["standard_error"], ratio * of["standard_error"]) / over
    return {"ratio": ratio, "standard_error": error}
