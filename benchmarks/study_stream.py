"""One arm of the ULTRA-HSTU study: a model that learns a stream, how well it predicted, and what that took.

Shapes: N events, P tested interactions of a step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from backtest.datasets import movietweetings
from backtest.long_range import LongRangeConfig, long_range_stream
from benchmarks.in_process import batches, learner_with_store
from benchmarks.whole_filter import WholeFilterEvaluation
from feature_store.interactions import Interactions
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.flops import TRAINING_FACTOR, forward_flops, mixture_forward_flops, segments_of, shortened_mean
from model.transducers import Transducer, hop_of, part_config, with_action_bits
from online_trainer.config import TrainerConfig
from online_trainer.learner import MeasuredStep
from online_trainer.learner_config import LearnerConfig
from stream.events import EventRules

Int64s = NDArray[np.int64]
START_MS = 1_700_000_000_000
EVENTS_PER_DAY = 5_000.0
DISCOUNT = 20
"""Ranks that count in NDCG."""
LIKED_FROM = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """What an arm learns. is_far: bool[N], events that depend on what is far back; None where nobody knows."""

    interactions: Interactions
    batch_interactions: int
    actions: tuple[str, ...] = EventRules().actions
    """Names of the actions' bits."""
    is_far: NDArray[np.bool_] | None = None
    ideal: dict[str, float] = field(default_factory=dict)
    filters_all: bool = False
    """Rank among what a user has not had at all, instead of what the model has not read: lengths can be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A model and its place in the study."""

    stream: str
    group: str
    """grid: quality against operations. ablation: one part changed."""
    family: str
    name: str
    model: dict[str, Any]
    loss: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.stream}/{self.group}/{self.name}"


def long_range(num_events: int) -> Stream:
    """The simulated stream, and what knowing everything scores on its second half."""
    made = long_range_stream(LongRangeConfig(num_events=num_events, num_users=8), np.random.default_rng(0))
    gaps_ms = np.random.default_rng(1).exponential(86_400_000 / EVENTS_PER_DAY, num_events)
    late = np.arange(num_events) >= num_events // 2
    known = late & ~np.isnan(made.ideal_hr_at_10)
    ideal = {
        "hr_at_10": float(made.ideal_hr_at_10[known].mean()),
        "ndcg_at_20": float(made.ideal_ndcg_at_20[known].mean()),
    }
    if (late & made.is_sequel).any():
        ideal["far_hr_at_10"] = float(made.sequel_hr_at_10[late & made.is_sequel].mean())
    stream = _interactions(made.user_id, made.item_id, START_MS + gaps_ms.cumsum().astype(np.int64), None)
    return Stream(interactions=stream, batch_interactions=64, is_far=made.is_sequel, ideal=ideal)


def ratings(num_events: int) -> Stream:
    """The ratings that ship with headrace, as values."""
    rows = pl.read_parquet(movietweetings().interactions).sort("timestamp", maintain_order=True).head(num_events)
    user, item, seconds = (rows[name].cast(pl.Int64).to_numpy() for name in ("user_id", "item_id", "timestamp"))
    stream = _interactions(user, item, 1_000 * seconds, rows["rating"].cast(pl.Float32).to_numpy())
    return Stream(interactions=stream, batch_interactions=128)


def liked(num_events: int) -> Stream:
    """The same, each rating as one of two actions: 8 of 10 and more is `liked`, all else `rated`."""
    stream = ratings(num_events).interactions
    is_liked = stream.value >= LIKED_FROM
    marked = replace(stream, action=np.where(is_liked, 2, 1).astype(np.uint32))
    return Stream(interactions=marked, batch_interactions=128, actions=("rated", "liked"))


def ml_1m(num_events: int, folder: Path) -> Stream:
    """The first ratings of MovieLens-1M by time. The order of a user's ratings is exact, that between users nearly so:
    nine in ten of their times are interpolated. Nobody rates a film twice.
    """
    rows = pl.read_parquet(folder / "interactions.parquet").filter(pl.col("seq_pos") >= 0).sort("user_id", "seq_pos")
    rows = rows.sort("timestamp", maintain_order=True).head(num_events)
    user, item, seconds = (rows[name].cast(pl.Int64).to_numpy() for name in ("user_id", "item_id", "timestamp"))
    stream = _interactions(user, item, 1_000 * seconds, rows["rating"].cast(pl.Float32).to_numpy())
    # Histories break ties of time by the key: in the file's order.
    stream = replace(stream, event_key=np.arange(1, len(stream) + 1, dtype=np.uint64))
    # No more than the shortest length of the study: a step ends where a user brings more than is read, and lengths
    # would then also differ in steps.
    return Stream(interactions=stream, batch_interactions=32, filters_all=True)


def _interactions(user_id: Int64s, item_id: Int64s, time_ms: Int64s, value: NDArray[np.float32] | None) -> Interactions:
    N = len(user_id)
    return Interactions(
        user_id=user_id,
        item_id=item_id,
        event_time_ms=time_ms,
        action=np.ones(N, np.uint32),
        value=np.full(N, np.nan, np.float32) if value is None else value,
        event_key=np.random.default_rng(0).integers(0, 2**63, N).astype(np.uint64),
        seq=np.zeros(N, np.uint32),
        arrival_ms=time_ms,
    )


@dataclass(slots=True)
class Account:
    """Sums over tested interactions and over what was read, since a point of the stream."""

    config: ModelConfig
    alpha: float = 0.0
    """Of stochastic length."""
    num: int = 0
    hits: float = 0.0
    gain: float = 0.0
    num_far: int = 0
    far_hits: float = 0.0
    training_flops: float = 0.0
    inference_flops: float = 0.0
    popular_hits: float = 0.0

    def note(self, step: MeasuredStep, is_far_P: NDArray[np.bool_] | None) -> None:
        """Take in one step's test."""
        rank_P = step.ranks["model"]
        is_hit_P = rank_P <= 10
        self.num += len(rank_P)
        self.hits += float(is_hit_P.sum())
        self.popular_hits += float((step.ranks["popularity"] <= 10).sum())
        self.gain += float((1 / np.log2(1.0 + rank_P[rank_P <= DISCOUNT])).sum())
        if is_far_P is not None:
            self.num_far += int(is_far_P.sum())
            self.far_hits += float(is_hit_P[is_far_P].sum())
        offsets, positions = torch.from_numpy(step.examples.offsets), torch.from_numpy(step.examples.positions)
        self.training_flops += TRAINING_FACTOR * float(self._forward_flops(step, offsets[:-1], offsets[1:], self.alpha))
        # A request reads the history that it comes after.
        starts = offsets[torch.searchsorted(offsets, positions, right=True) - 1]
        self.inference_flops += float(self._forward_flops(step, starts, positions + 1, 0.0))

    def _forward_flops(self, step: MeasuredStep, starts_B: Tensor, ends_B: Tensor, alpha: float) -> float:
        """Of reading the interactions from each start to each end of a step's histories; expected, where shortened."""
        lengths_B = ends_B - starts_B
        if self.config.transducers:
            actions_L = torch.from_numpy(step.examples.acts)
            own_TB = [_own(one, self.config, actions_L, starts_B, ends_B) for one in self.config.transducers]
            return float(mixture_forward_flops(self.config, own_TB, lengths_B).sum())
        segments = segments_of(self.config)
        if not alpha:
            return float(forward_flops(segments, lengths_B).sum())

        def cost(n_B: Tensor) -> Tensor:
            return forward_flops(segments, n_B)

        return float(shortened_mean(cost, lengths_B, alpha=alpha, max_len=self.config.max_len).sum())

    def means(self) -> dict[str, float]:
        """Of one tested interaction."""
        found = {
            "count": self.num,
            "hr_at_10": self.hits / self.num,
            "ndcg_at_20": self.gain / self.num,
            "popularity_hr_at_10": self.popular_hits / self.num,
            "training_flops": self.training_flops / self.num,
            "inference_flops": self.inference_flops / self.num,
        }
        return found | ({"far_hr_at_10": self.far_hits / self.num_far} if self.num_far else {})


def _own(transducer: Transducer, config: ModelConfig, actions_L: Tensor, starts_B: Tensor, ends_B: Tensor) -> Tensor:
    """int64[B]: how many interactions of each part of a history a transducer reads."""
    limit = part_config(config, transducer).max_len
    counts_L1 = torch.cat([torch.zeros(1, dtype=torch.int64), ((actions_L & transducer.mask) != 0).cumsum(0)])
    own_B = counts_L1[ends_B] - counts_L1[starts_B]
    hop = hop_of(limit)
    return own_B - ((own_B - limit).clamp(min=0) + hop - 1) // hop * hop


def run_arm(arm: Arm, stream: Stream) -> dict[str, Any]:
    """Learn the stream once; means over what came after its middle."""
    model = with_action_bits(ModelConfig(**arm.model), stream.actions)
    config = LearnerConfig(
        trainer=TrainerConfig(
            num_threads=1, batch_interactions=stream.batch_interactions, batch_tokens=1 << 20, replay_share=0.0
        ),
        model=model,
        loss=LossConfig(**arm.loss),
        optimizer=OptimizerConfig(),
        actions=stream.actions,
    )
    account, taken = Account(config=model, alpha=config.loss.stochastic_length_alpha), 0
    middle = len(stream.interactions) // 2
    began_cpu, began = time.process_time(), time.perf_counter()
    with learner_with_store(config) as (learner, store):

        def on_tested(step: MeasuredStep) -> None:
            if taken >= middle:
                rows_P = step.examples.target_rows
                account.note(
                    step, None if stream.is_far is None else stream.is_far[taken : taken + len(step.new)][rows_P]
                )

        learner.on_tested = on_tested
        if stream.filters_all:
            learner.evaluation = WholeFilterEvaluation(
                config.trainer,
                stream.interactions,
                rows_of=learner.model.items.lookup,
                num_taken=lambda: learner.ledger.num_interactions,
            )
        for batch in batches(learner, store, config, stream.interactions):
            learner.step(batch)
            taken = learner.ledger.num_interactions
        num_set_aside, num_steps = learner.ledger.num_quarantined, learner.ledger.num_steps
    return {
        "stream": arm.stream,
        "group": arm.group,
        "family": arm.family,
        "name": arm.name,
        "model": arm.model,
        "loss": arm.loss,
        **account.means(),
        "set_aside": num_set_aside,
        "steps": num_steps,
        "cpu_s": round(time.process_time() - began_cpu, 1),
        "wall_s": round(time.perf_counter() - began, 1),
    }
