"""The ranking head: what it predicts on a real stream, and what scoring many candidates at once saves.

    python benchmarks/bench_ranking.py [--events 40000] [--only interactions impressions scoring] [--set …]

interactions: movietweetings, whether a rating is 8 or more, predicted before it is learned. impressions: the same
stream; each rated film is shown among four that others rated lately (so that popularity alone says nothing), and
whether it is the one that was taken is predicted when its label comes, 500 interactions later. Both beside the item's
mean so far, shrunk towards the mean of all, on the same items. HR@10 of retrieval is that of the same run.
scoring: CPU time of 256 candidates behind one history, with the history run once and with one candidate at a time.
One thread. Writes --results. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from backtest.datasets import movietweetings
from benchmarks.environment import environment
from benchmarks.in_process import batches, learner_with_store
from feature_store.interactions import Interactions
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.ranker import rank_candidates
from model.ranking_model import with_ranking_head
from model.ranking_network import Engagements
from model.ranking_settings import RankingSettings
from model.recommender import Recommender
from model.sequence import Candidates
from online_trainer.action_metrics import ActionMeter
from online_trainer.config import TrainerConfig
from online_trainer.label_queue import LabelBatch, LabelPosition, label_keys
from online_trainer.labelled_items import LabelledItems
from online_trainer.learner import OnlineLearner
from online_trainer.learner_config import LearnerConfig
from stream.events import EventRules

ACTIONS = EventRules().actions
GOOD = 8.0
PSEUDO_COUNT = 10.0
"""Labels of the mean of all that an item's mean starts with."""
NUM_OTHERS, LABEL_DELAY = 4, 500
NEVER = np.iinfo(np.int64).max


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, measure in (("interactions", _interactions), ("impressions", _impressions), ("scoring", _scoring)):
        if name in options.only:
            found[name] = measure(options)
            print(name, json.dumps(found[name], indent=1))
    result = {"benchmark": "ranking", "events": options.events, "set": options.set, **found, **environment()}
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the ranking head predicts, and what scoring costs.")
    parser.add_argument("--events", type=int, default=141_695, help="events of the stream at most")
    names = ("interactions", "impressions", "scoring")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--set", nargs="*", default=[], help="settings as ranking.tokens=interleaved")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    return parser.parse_args()


@dataclass
class ItemMeans:
    """The baseline: the mean label of each item so far."""

    counts: dict[int, tuple[float, float]] = field(default_factory=dict)
    total: tuple[float, float] = (1.0, 0.5)

    def logits(self, item_ids: NDArray[np.int64]) -> NDArray[np.float64]:
        overall = self.total[1] / self.total[0]
        seen = np.array([self.counts.get(item, (0.0, 0.0)) for item in item_ids.tolist()]).reshape(-1, 2)
        mean = (seen[:, 1] + PSEUDO_COUNT * overall) / (seen[:, 0] + PSEUDO_COUNT)
        logits: NDArray[np.float64] = np.log(mean) - np.log1p(-mean)
        return logits

    def add(self, item_ids: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        for item, label in zip(item_ids.tolist(), labels.tolist(), strict=True):
            count, positive = self.counts.get(item, (0.0, 0.0))
            self.counts[item] = (count + 1, positive + label)
        self.total = (self.total[0] + len(labels), self.total[1] + float(labels.sum()))


def _ratings(num_events: int) -> Interactions:
    rows = pl.read_parquet(movietweetings().interactions).sort("timestamp", maintain_order=True).head(num_events)
    num, time_ms = len(rows), rows["timestamp"].cast(pl.Int64).to_numpy() * 1000
    return Interactions(
        user_id=rows["user_id"].cast(pl.Int64).to_numpy(),
        item_id=rows["item_id"].cast(pl.Int64).to_numpy(),
        event_time_ms=time_ms,
        action=np.full(num, 1 << ACTIONS.index("rating"), np.uint32),
        value=rows["rating"].cast(pl.Float32).to_numpy(),
        event_key=np.arange(1, num + 1, dtype=np.uint64),
        seq=np.zeros(num, np.uint32),
        arrival_ms=time_ms,
    )


def _settings(options: argparse.Namespace, **given: Any) -> RankingSettings:
    changed: dict[str, Any] = {}
    for one in options.set:
        key, value = one.split("=", 1)
        try:
            changed[key.removeprefix("ranking.")] = json.loads(value)
        except json.JSONDecodeError:
            changed[key.removeprefix("ranking.")] = value
    return RankingSettings(**given | changed)


def _config(settings: RankingSettings) -> LearnerConfig:
    return LearnerConfig(
        trainer=TrainerConfig(num_threads=1, metrics_window=20_000),
        model=with_ranking_head(ModelConfig(), settings, ACTIONS),
        loss=LossConfig(),
        optimizer=OptimizerConfig(),
        ranking=settings,
        actions=ACTIONS,
    )


def _interactions(options: argparse.Namespace) -> dict[str, Any]:
    settings = _settings(
        options, tasks=(f"value>={GOOD:g}",), learn_from="interactions", value_thresholds=(5.0, 7.0, 8.0, 9.0)
    )
    config, stream = _config(settings), _ratings(options.events)
    means, meter = ItemMeans(), ActionMeter(config.trainer.metrics_window)
    with learner_with_store(config) as (learner, store):
        started_s = time.process_time()
        for batch in batches(learner, store, config, stream):
            new = batch.interactions
            is_listed = learner.model.items.lookup(new.item_id) >= 0
            labels = (new.value >= GOOD).astype(np.int64)
            meter.add(means.logits(new.item_id[is_listed]), labels[is_listed])
            learner.step(batch)
            means.add(new.item_id, labels)
        return _told(learner, settings.tasks[0], meter, time.process_time() - started_s)


def _impressions(options: argparse.Namespace) -> dict[str, Any]:
    settings = _settings(options, tasks=("rating",), value_thresholds=(5.0, 7.0, 8.0, 9.0))
    config, stream = _config(settings), _ratings(options.events)
    rng, recent = np.random.default_rng(0), deque[int](maxlen=2_000)
    means, meter, waiting = ItemMeans(), ActionMeter(config.trainer.metrics_window), deque[LabelBatch]()
    with learner_with_store(config) as (learner, store):
        started_s = time.process_time()
        for batch in batches(learner, store, config, stream):
            new = batch.interactions
            if len(recent) == recent.maxlen:
                waiting.append(_shown(new, np.array(recent), rng, number=learner.ledger.num_steps))
            learner.step(batch)
            recent.extend(new.item_id.tolist())
            if len(waiting) * config.trainer.batch_interactions > LABEL_DELAY:
                labels = waiting.popleft()
                items = labels.items
                is_listed = learner.model.items.lookup(items.item_id) >= 0
                taken = (items.action > 0).astype(np.int64)
                meter.add(means.logits(items.item_id[is_listed]), taken[is_listed])
                learner.learn_labels(labels)
                means.add(items.item_id, taken)
        return _told(learner, settings.tasks[0], meter, time.process_time() - started_s)


def _shown(new: Interactions, recent: NDArray[np.int64], rng: np.random.Generator, *, number: int) -> LabelBatch:
    """Each interaction's item among others, in random order, right before it happened."""
    num, width = len(new), NUM_OTHERS + 1
    items = np.column_stack([new.item_id, recent[rng.integers(0, len(recent), (num, NUM_OTHERS))]])
    is_taken = np.arange(width)[None] == 0
    order = rng.permuted(np.tile(np.arange(width), (num, 1)), axis=1)
    items = np.take_along_axis(items, order, 1).ravel()
    taken = np.take_along_axis(np.tile(is_taken, (num, 1)), order, 1).ravel()
    return LabelBatch(
        items=LabelledItems(
            user_id=new.user_id,
            shown_at_ms=new.event_time_ms,
            known_before_ms=new.event_time_ms,
            written_before_ms=new.event_time_ms,
            below_seq=np.full(num, NEVER),
            surface=np.zeros(num, np.uint8),
            offsets=width * np.arange(num + 1),
            item_id=items,
            action=np.where(taken, new.action.repeat(width), 0).astype(np.uint32),
            value=np.where(taken, new.value.repeat(width), np.nan).astype(np.float32),
            is_measured=np.ones(num * width, np.bool_),
        ),
        keys=np.concatenate([label_keys(f"{number}.{row}", "x", items[width * row :][:width]) for row in range(num)]),
        is_late=np.zeros(num * width, np.bool_),
        positions={0: LabelPosition(number)},
    )


def _told(learner: OnlineLearner, task: str, baseline: ActionMeter, cpu_s: float) -> dict[str, Any]:
    assert learner.ranking is not None
    head = learner.ranking.measured()
    spans = {
        "lifetime": (head[task, "lifetime"], baseline.lifetime()),
        "window": (head[task, "window"], baseline.windowed()),
    }
    return {
        "task": task,
        **{
            span: {
                "count": own.count,
                **{
                    arm: {name: getattr(of, name) for name in ("ne", "auc", "calibration")}
                    for arm, of in (("head", own), ("item_mean", other))
                },
            }
            for span, (own, other) in spans.items()
        },
        "retrieval": {name: learner.metrics_summary()[f"model.lifetime.{name}"] for name in ("hr_at_10", "ndcg_at_20")},
        "accounts": learner.ranking.status(),
        "events_per_cpu_s": learner.ledger.num_interactions / cpu_s,
    }


def _scoring(options: argparse.Namespace) -> dict[str, Any]:
    return {
        f"{tokens}, history {length}": _scoring_of(
            replace(_settings(options, tasks=("rating",)), tokens=tokens), length
        )
        for tokens in ("merged", "interleaved")
        for length in (64, 200)
    }


@torch.inference_mode()
def _scoring_of(settings: RankingSettings, length: int, *, num_candidates: int = 256) -> dict[str, float]:
    recommender = Recommender(with_ranking_head(ModelConfig(max_len=length), settings, ACTIONS))
    network, width = recommender.ranking, recommender.config.embedding_dim
    assert network is not None
    generator = torch.Generator().manual_seed(0)
    history = Engagements(
        item_LD=torch.randn(length, width, generator=generator),
        actions_L=torch.ones(length, dtype=torch.int64),
        timestamps_ms_L=60_000 * torch.arange(length),
        offsets=torch.tensor([0, length]),
        values_L=torch.full((length,), torch.nan),
    )
    shown = Candidates(
        item_CD=torch.randn(num_candidates, width, generator=generator),
        request_times_ms_B=torch.tensor([60_000 * (length + 1)]),
        offsets=torch.tensor([0, num_candidates]),
    )
    one = torch.tensor([0, 1])

    def alone() -> torch.Tensor:
        return torch.cat(
            [
                network(history, replace(shown, item_CD=shown.item_CD[n : n + 1], offsets=one)).candidates_CK
                for n in range(num_candidates)
            ]
        )

    together_s = min(_cpu_s(lambda: rank_candidates(network, history, shown)) for _ in range(20))
    alone_s = min(_cpu_s(alone) for _ in range(3))
    differs = (rank_candidates(network, history, shown) - alone()).abs().max()
    assert differs < 1e-5, f"scores differ by {differs:.2g} from those of one at a time"
    return {"together_ms": 1e3 * together_s, "one_at_a_time_ms": 1e3 * alone_s, "ratio": alone_s / together_s}


def _cpu_s(call: Any) -> float:
    started_s = time.process_time()
    call()
    return time.process_time() - started_s


if __name__ == "__main__":
    main()
