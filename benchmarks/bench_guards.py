"""Do a worker's guards trip on ordinary versions of a model that learns a real stream, and on spoiled ones?

    python benchmarks/bench_guards.py [--events 60000] [--every 1000] [--answers 200] [--results FILE]

The trainer learns movietweetings from nothing. After every --every interactions there is a version, and --answers users
who acted last are recommended ten items with it: what a worker's guards would see. Each version is judged by the guards
as they are set by default. Beside that, every version is spoiled in several ways, and judged in the place of the next.
Times are CPU times. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from backtest.datasets import movietweetings
from benchmarks.environment import environment
from benchmarks.in_process import batches, learner_with_store
from feature_store.interactions import Interactions
from model.batch import HistoryBatch
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.recommender import Recommender
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.learner_config import LearnerConfig
from serving.guard_config import GuardConfig
from serving.guards import SCORES, Case, SwapGuards, judge
from serving.queries import Ranking, RecommendQuery
from serving.weights import WeightsInfo

NO_IDS = np.empty(0, np.int64)
QUERY = RecommendQuery(user_id=0, k=10, exclude_seen=False, exclude=NO_IDS)
"""Guards look at its kind alone."""


def _lose_the_scale(recommender: Recommender) -> None:
    recommender.log_scale.fill_(0.0)


def _shuffle_the_items(recommender: Recommender) -> None:
    order = torch.randperm(recommender.items.num_items, generator=torch.Generator().manual_seed(0))
    recommender.items.bias[: recommender.items.num_items] = recommender.items.bias[: recommender.items.num_items][order]
    weight = recommender.items.weight
    weight[: recommender.items.num_items] = weight[: recommender.items.num_items][order]


def _spoil_the_biases(recommender: Recommender) -> None:
    recommender.items.bias.add_(5)


def _double_the_scale(recommender: Recommender) -> None:
    recommender.log_scale.add_(math.log(2))


SPOILED: dict[str, Callable[[Recommender], None]] = {
    "scale lost": _lose_the_scale,
    "scale doubled": _double_the_scale,
    "all biases + 5": _spoil_the_biases,
    "items shuffled": _shuffle_the_items,
}


class Answers:
    """What the users who acted last are recommended."""

    def __init__(self, users: NDArray[np.int64], items: NDArray[np.int64], times_ms: NDArray[np.int64]) -> None:
        self._users, self._items, self._times = users, items, times_ms

    @torch.no_grad()
    def scores(self, recommender: Recommender, num_events: int, num_answers: int) -> list[NDArray[np.float32]]:
        """Ten best scores for each."""
        seen = self._users[:num_events]
        _, last = np.unique(seen[::-1], return_index=True)
        found = []
        for user in seen[::-1][np.sort(last)[:num_answers]]:
            places = np.flatnonzero(seen == user)[-recommender.config.max_len :]
            rows = recommender.items.lookup(self._items[places])
            if not (rows >= 0).any():
                continue
            times = self._times[places]
            batch = HistoryBatch(
                rows_L=torch.from_numpy(rows),
                timestamps_ms_L=torch.from_numpy(times),
                query_times_ms_L=torch.from_numpy(np.append(times[1:], times[-1] + 1)),
                offsets=torch.tensor([0, len(rows)]),
            )
            scores = recommender.scores(recommender.encode(batch)[-1:])[0]
            found.append(torch.topk(scores, min(10, len(scores))).values.numpy())
        return found


def _rankings(version: int, scores: Sequence[NDArray[np.float32]]) -> list[Ranking]:
    info = WeightsInfo(version=version, kind="delta", watermark_ms=0, created_at_ms=0)
    return [
        Ranking(weights=info, history_time_ms=None, fallback_reason=None, item_ids=NO_IDS, scores=one, places=NO_IDS)
        for one in scores
    ]


def _spoiled_case(guards: SwapGuards, scores: Sequence[NDArray[np.float32]]) -> Case | None:
    """The case that a spoiled version would make in the place of the next."""
    trial = copy.deepcopy(guards)
    for ranking in _rankings(0, scores):
        trial.answered(0, [QUERY], [ranking], 1.0)
    return trial.due()


def _defaults() -> LearnerConfig:
    return LearnerConfig(
        trainer=TrainerConfig(num_threads=1),
        items=ItemsConfig(),
        model=ModelConfig(),
        loss=LossConfig(),
        optimizer=OptimizerConfig(),
    )


def _stream(num_events: int) -> Interactions:
    rows = pl.read_parquet(movietweetings().interactions).sort("timestamp", maintain_order=True).head(num_events)
    times_ms = rows["timestamp"].cast(pl.Int64).to_numpy() * 1000
    return Interactions(
        user_id=rows["user_id"].cast(pl.Int64).to_numpy(),
        item_id=rows["item_id"].cast(pl.Int64).to_numpy(),
        event_time_ms=times_ms,
        action=np.ones(len(rows), np.uint32),
        value=np.full(len(rows), np.nan, np.float32),
        event_key=np.random.default_rng(0).integers(0, 2**63, len(rows)).astype(np.uint64),
        seq=np.zeros(len(rows), np.uint32),
        arrival_ms=times_ms,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=60_000)
    parser.add_argument("--every", type=int, default=1_000)
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--results", type=Path, help="JSON file to write")
    options = parser.parse_args()
    config, guard_config = _defaults(), GuardConfig(answers_min=options.answers // 2)
    stream = _stream(options.events)
    answers = Answers(stream.user_id, stream.item_id, stream.event_time_ms)
    guards = SwapGuards(guard_config)
    distances: list[float] = []
    trips: list[tuple[int, str]] = []
    caught: dict[str, list[bool]] = {name: [] for name in SPOILED}
    judge_s, version = 0.0, 0
    with learner_with_store(config) as (learner, store):
        for batch in batches(learner, store, config, stream):
            learner.step(batch)
            taken = learner.ledger.num_interactions
            if taken < (version + 1) * options.every:
                continue
            version += 1
            is_known = guards.good is not None and version % 5 == 0
            for name, spoil in SPOILED.items() if is_known else ():
                spoiled = copy.deepcopy(learner.model)
                with torch.no_grad():
                    spoil(spoiled)
                case = _spoiled_case(guards, answers.scores(spoiled, taken, options.answers))
                if case is not None and len(case.ordinary) >= 3:
                    caught[name].append(judge(guard_config, case).guard == SCORES)
            for ranking in _rankings(version, answers.scores(learner.model, taken, options.answers)):
                guards.answered(version, [QUERY], [ranking], 1.0)
            case = guards.due()
            if case is None:
                continue
            began_s = time.process_time()
            judgement = judge(guard_config, case)
            judge_s += time.process_time() - began_s
            if judgement.distance is not None:
                distances.append(judgement.distance)
            if judgement.guard is not None:
                trips.append((taken, f"{judgement.guard}: {judgement.sentence}"))
            guards.passed(judgement)
    print(f"{len(distances)} ordinary versions judged, {len(trips)} trips: {trips}")
    print("distance of the scores p50 {:.3f}, p90 {:.3f}, max {:.3f}".format(*np.quantile(distances, [0.5, 0.9, 1.0])))
    for name, found in caught.items():
        print(f"{name:<16} caught {sum(found)} of {len(found)}")
    result = {
        "benchmark": "guards",
        "judged": len(distances),
        "trips": len(trips),
        "distance": dict(zip(("p50", "p90", "max"), np.quantile(distances, [0.5, 0.9, 1.0]).tolist(), strict=True)),
        "distances": [round(one, 3) for one in distances],
        "caught": {name: [sum(found), len(found)] for name, found in caught.items()},
        "judge_cpu_ms": 1000 * judge_s / max(1, len(distances)),
        **environment(),
    }
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
