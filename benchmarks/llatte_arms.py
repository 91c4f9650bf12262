"""One arm of the LLaTTE study: a model that learns a stream once, every rating predicted before it is learned from.

Shapes: N ratings, R requests, B requests of a step, W width of a vector.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.llatte_streams import Histories, Int64s, Stream
from model.config import ModelConfig, OptimizerConfig
from model.item_table import ItemTable
from model.llatte_config import LlatteSettings
from model.optimizer import RecommenderOptimizer
from model.ranking_learning import ShownBatch, ranking_pass
from model.ranking_model import upstream_model_config, with_ranking_head
from model.recommender import Recommender
from model.upstream_config import UpstreamConfig
from model.upstream_input import UpstreamVectors
from model.upstream_model import UpstreamExamples, UpstreamModel, UserBatch

Floats = NDArray[np.float32]
MAX_ITEMS: Final = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How every arm learns."""

    batch: int
    """Requests of a step."""
    dense_rate: float
    row_rate: float
    seed: int = 0
    first_version: float = 0.2
    """Share of the stream after which the upstream's first version is out: nobody has a vector before."""

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(dense_learning_rate=self.dense_rate, row_learning_rate=self.row_rate, warm_up_steps=50)

    def steps(self, num_requests: int) -> list[Int64s]:
        """The requests of each step."""
        firsts = range(0, num_requests, self.batch)
        return [np.arange(first, min(first + self.batch, num_requests)) for first in firsts]


@dataclass(frozen=True, kw_only=True, slots=True)
class Vectors:
    """Of each request's user: float32[R, W], and float32[R], seconds since what it knows; NaN: there is none."""

    vector_RW: Floats
    age_s_R: Floats


def run_upstream(stream: Stream, config: UpstreamConfig, plan: Plan, stale_s: dict[str, int]) -> dict[str, Any]:
    """Losses of every rating, and each user's vector as it was then, made of what had happened some time before."""
    ranking = stream.ranking()
    model = UpstreamModel(
        upstream_model_config(replace(config, seed=plan.seed, max_items=MAX_ITEMS), ranking, ("rate",))
    )
    optimizer = RecommenderOptimizer(model, plan.optimizer())
    histories, generator = Histories(stream), torch.Generator().manual_seed(plan.seed)
    num = stream.num_requests
    vectors = {name: np.zeros((num, config.width), np.float32) for name in stale_s}
    ages = {name: np.full(num, np.nan, np.float32) for name in stale_s}
    losses, started_s, learning_s = [], time.process_time(), 0.0
    for requests in plan.steps(num):
        if requests[0] >= plan.first_version * num:
            for name, seconds in stale_s.items():
                places, offsets = histories.of(requests, max_len=config.max_len, stale_ms=1000 * seconds)
                asked_ms = stream.time_ms[stream.offsets[requests]]
                as_of_ms, has_any = asked_ms.copy(), np.diff(offsets) > 0
                as_of_ms[has_any] = stream.time_ms[places[offsets[1:][has_any] - 1]]
                users = UserBatch(
                    **inputs_of(stream, places, offsets, model.items), as_of_ms_B=torch.from_numpy(as_of_ms)
                )
                vectors[name][requests] = model.user_vectors(users).numpy()
                ages[name][requests] = np.where(has_any, (asked_ms - as_of_ms) / 1000, np.nan)
        began_s = time.process_time()
        rows = rows_of(stream, requests)
        model.items.admit(stream.item[rows])
        shown = shown_of(stream, histories, requests, rows, config.max_len, model.items)
        labels = model.heads.labels(torch.ones(len(rows), dtype=torch.int64), torch.from_numpy(stream.value[rows]))
        examples = UpstreamExamples.of_shown(shown, labels, torch.ones(len(rows), dtype=torch.bool))
        step = model.learning_pass(examples, generator=generator)
        losses.append(losses_of(step.predictions_CK, stream, rows))
        step.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(step.active)
        learning_s += time.process_time() - began_s
    return {
        "losses": np.concatenate(losses),
        "cpu_s": np.array(time.process_time() - started_s),
        "learning_cpu_s": np.array(learning_s),
        **{f"vector {name}": one for name, one in vectors.items()},
        **{f"age {name}": one for name, one in ages.items()},
    }


def run_ranker(
    stream: Stream,
    settings: LlatteSettings,
    plan: Plan,
    vectors: Vectors | None,
    *,
    max_len: int,
    width: int = 32,
) -> dict[str, Any]:
    """Losses of every rating by a ranker with these vectors, or without any; of content where the settings say so."""
    upstream_width = 1 if vectors is None else vectors.vector_RW.shape[1]
    base = ModelConfig(embedding_dim=width, max_len=max_len, max_items=MAX_ITEMS, seed=plan.seed)
    model = Recommender(with_ranking_head(base, stream.ranking(), ("rate",), settings, upstream_width=upstream_width))
    assert model.ranking is not None
    optimizer = RecommenderOptimizer(model, plan.optimizer(), parameters=model.ranking_parameters())
    histories, generator = Histories(stream), torch.Generator().manual_seed(plan.seed)
    losses, started_s = [], time.process_time()
    for requests in plan.steps(stream.num_requests):
        rows = rows_of(stream, requests)
        admitted = model.items.admit(stream.item[rows])
        if settings.content:
            assert stream.content is not None
            ids, content_VC = stream.content
            model.items.describe(admitted, content_VC[np.searchsorted(ids, stream.item[rows])])
        shown = shown_of(stream, histories, requests, rows, max_len, model.items)
        if vectors is not None:
            upstream = UpstreamVectors(
                vector_BW=torch.from_numpy(vectors.vector_RW[requests]),
                age_s_B=torch.from_numpy(vectors.age_s_R[requests]),
            )
            shown = replace(shown, upstream=upstream)
        labels = model.ranking.heads.labels(
            torch.ones(len(rows), dtype=torch.int64), torch.from_numpy(stream.value[rows])
        )
        step = ranking_pass(model, shown, labels, generator=generator)
        losses.append(losses_of(step.predictions_CK, stream, rows))
        step.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(step.active)
    return {"losses": np.concatenate(losses), "cpu_s": np.array(time.process_time() - started_s)}


def rows_of(stream: Stream, requests: Int64s) -> Int64s:
    """Ratings of consecutive requests."""
    return np.arange(stream.offsets[requests[0]], stream.offsets[requests[-1] + 1])


def inputs_of(stream: Stream, places: Int64s, offsets: Int64s, table: ItemTable) -> dict[str, Any]:
    """Histories as models read them."""
    return {
        "rows_L": torch.from_numpy(table.lookup(stream.item[places])),
        "actions_L": torch.ones(len(places), dtype=torch.int64),
        "values_L": torch.from_numpy(stream.value[places]),
        "timestamps_ms_L": torch.from_numpy(stream.time_ms[places]),
        "offsets": torch.from_numpy(offsets),
    }


def shown_of(
    stream: Stream, histories: Histories, requests: Int64s, rows: Int64s, max_len: int, table: ItemTable
) -> ShownBatch:
    """The items of these requests, behind what their users had rated before."""
    places, offsets = histories.of(requests, max_len=max_len)
    first = stream.offsets[requests[0]]
    return ShownBatch(
        **inputs_of(stream, places, offsets, table),
        shown_rows_C=torch.from_numpy(table.lookup(stream.item[rows])),
        shown_at_ms_R=torch.from_numpy(stream.time_ms[stream.offsets[requests]]),
        shown_offsets=torch.from_numpy(stream.offsets[requests[0] : requests[-1] + 2] - first),
    )


def losses_of(logits_CK: Tensor, stream: Stream, rows: Int64s) -> NDArray[np.float64]:
    """float64[C], nats."""
    likes = torch.from_numpy(stream.likes[rows].astype(np.float64))
    return functional.binary_cross_entropy_with_logits(logits_CK[:, 0].double(), likes, reduction="none").numpy()
