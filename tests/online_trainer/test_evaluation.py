"""The test before each update: what is compared with what, and that testing changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from feature_store.store import FeatureStore
from online_trainer.config import TrainerConfig
from online_trainer.evaluation import ARMS, Evaluation
from online_trainer.examples import Examples
from tests.online_trainer.conftest import record_stream, walks
from tests.online_trainer.row_moves import moves_without


def examples(histories: list[list[int]]) -> tuple[Examples, torch.Tensor, torch.Tensor]:
    """Histories of item rows of which the last is predicted from the others; the item ids are the rows."""
    inputs = [row for history in histories for row in history[:-1]]
    offsets = np.cumsum([0, *(len(history) - 1 for history in histories)])
    return (
        Examples(
            item_id=np.array(inputs),
            event_time_ms=np.zeros(len(inputs), np.int64),
            query_time_ms=np.full(len(inputs), 1_000),
            acts=np.ones(len(inputs), np.int64),
            value=np.full(len(inputs), np.nan, np.float32),
            next_action=np.ones(len(inputs), np.uint32),
            offsets=offsets,
            positions=offsets[1:] - 1,
            is_in_order=np.ones(len(inputs), bool),
            target_item_id=np.array([history[-1] for history in histories]),
            target_rows=np.arange(len(histories)),
            num_first=0,
            num_out_of_reach=0,
        ),
        torch.tensor(inputs),
        torch.tensor([history[-1] for history in histories]),
    )


def test_interactions_are_split_by_what_was_known_before_their_batch() -> None:
    evaluation = Evaluation(TrainerConfig(metrics_new_below=3))
    rows = np.array([0, 0, 0, 1, 1, 2])
    evaluation.observe(rows, np.full(6, 500))
    batch, rows_L, targets = examples([[1, 2, 0], [1, 2, 3, 0], [0, 1], [0, 7], [0, 1, 2, 5]])
    test = evaluation.start(batch, rows_L, targets, num_known=4)
    test.on_logits(slice(0, 2), torch.tensor([[9.0, 0, 0, 0, 99], [1.0, 5, 5, 2, 99]]))
    test.on_logits(slice(2, 5), torch.zeros(3, 5))
    evaluation.finish(test)
    found = evaluation.detailed()
    assert [found[f"model.lifetime.{group}.count"] for group in ("unknown_item", "new_item", "known_item")] == [2, 1, 2]
    assert [found[f"model.lifetime.{group}.count"] for group in ("new_user", "known_user")] == [3, 2]
    # Of four known items: first, first (three are seen), last of the three that are not seen.
    assert found["model.lifetime.known_item.hr_at_1"] == 1.0
    assert found["model.lifetime.new_item.mrr"] == 1 / 3
    assert found["model.lifetime.unknown_item.hr_at_50"] == 0.0


def test_every_arm_is_tested_on_the_same_interactions(store: FeatureStore) -> None:
    stream = record_stream(store, walks(400))
    learner = stream.learner(metrics_new_below=2)
    batcher = stream.batcher(learner)
    while batch := batcher.take():
        learner.step(batch)
    counts: dict[tuple[str, str], set[int]] = {}
    for one in learner.evaluation.measured():
        counts.setdefault((one.span, one.group), set()).add(one.metrics.count)
    assert all(len(of_arms) == 1 for of_arms in counts.values())
    summary = learner.metrics_summary()
    assert summary["model.lifetime.count"] == learner.ledger.num_supervised
    assert {name.split(".")[0] for name in summary} == set(ARMS)
    detailed = learner.evaluation.detailed()
    for kinds in (("unknown_item", "new_item", "known_item"), ("new_user", "known_user")):
        for span in ("lifetime", "window"):
            assert sum(detailed[f"model.{span}.{kind}.count"] for kind in kinds) == summary[f"model.{span}.count"]


def test_where_the_next_item_follows_from_the_last_cooccurrence_finds_it(store: FeatureStore) -> None:
    stream = record_stream(store, walks(700, num_users=40))
    learner = stream.learner()
    batcher = stream.batcher(learner)
    while batch := batcher.take():
        learner.step(batch)
    summary = learner.metrics_summary()
    assert summary["cooccurrence.window.hr_at_1"] > 5 * summary["popularity.window.hr_at_1"]


def test_testing_changes_nothing_of_what_is_learned(store: FeatureStore) -> None:
    class Untested(Evaluation):
        def finish(self, *_args: object) -> dict[str, Any]:
            return {}

    stream = record_stream(store, walks(200))
    tested, untested = stream.learner(), stream.learner()
    untested.evaluation = Untested(TrainerConfig())
    for learner in (tested, untested):
        batcher = stream.batcher(learner)
        while batch := batcher.take():
            learner.step(batch)
    for name, tensor in tested.capture_checkpoint().tensors.items():
        if not name.startswith("metrics."):
            assert torch.equal(tensor, untested.capture_checkpoint().tensors[name]), name


def test_what_left_the_catalogue_is_forgotten() -> None:
    evaluation = Evaluation(TrainerConfig(metrics_new_below=2))
    evaluation.observe(np.array([0, 0, 1, 1]), np.full(4, 500))
    evaluation.follow(moves_without([1], num_before=2))
    batch, rows_L, targets = examples([[0, 1]])
    test = evaluation.start(batch, rows_L, targets, num_known=2)
    test.on_logits(slice(0, 1), torch.zeros(1, 2))
    evaluation.finish(test)
    assert evaluation.detailed()["popularity.lifetime.new_item.count"] == 1
