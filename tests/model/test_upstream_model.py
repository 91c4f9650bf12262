"""Vectors of users: of any history, from the past only, learned from what the ranker learns from, and published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import OptimizerConfig
from model.manifest import Manifest
from model.optimizer import RecommenderOptimizer
from model.ranking_learning import ShownBatch
from model.ranking_model import upstream_model_config
from model.ranking_settings import RankingSettings
from model.snapshot import load_snapshot, write_snapshot
from model.swap import apply_snapshot, take_rows
from model.upstream_config import UpstreamConfig
from model.upstream_model import UpstreamExamples, UpstreamModel, UserBatch

START_MS = 1_700_000_000_000
CONFIG = UpstreamConfig(
    width=16,
    embedding_dim=8,
    num_layers=2,
    num_heads=2,
    latent_dim=8,
    head_dim=4,
    ffn_dim=16,
    num_queries=2,
    readout_rank=8,
    max_len=20,
    num_negatives=8,
    task_hidden_dim=8,
    max_items=1_000,
)
RANKING = RankingSettings(tasks=("buy", "value>=4"), value_thresholds=(4,))
ACTIONS = ("view", "buy")
NUM_ITEMS = 20
"""Items 0 ... 19; users of a taste meet mostly those of its parity, and buy nothing else."""


def upstream(config: UpstreamConfig = CONFIG) -> UpstreamModel:
    model = UpstreamModel(upstream_model_config(config, RANKING, ACTIONS))
    model.items.admit(np.arange(NUM_ITEMS))
    return model


def users_of(lengths: list[int], rng: np.random.Generator, taste_B: np.ndarray | None = None) -> UserBatch:
    num = sum(lengths)
    items = rng.integers(0, NUM_ITEMS // 2, num) * 2
    if taste_B is not None:
        items = items + np.repeat(taste_B, lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = START_MS + np.concatenate([np.cumsum(rng.integers(0, 10**7, n)) for n in lengths])
    return UserBatch(
        rows_L=torch.from_numpy(items),
        actions_L=torch.from_numpy(rng.integers(1, 4, num)),
        values_L=torch.from_numpy(rng.choice([np.nan, 3.0, 5.0], num)).float(),
        timestamps_ms_L=torch.from_numpy(times.astype(np.int64)),
        offsets=torch.from_numpy(offsets),
        as_of_ms_B=torch.full((len(lengths),), START_MS + 10**9),
    )


def examples_of(model: UpstreamModel, step: int) -> UpstreamExamples:
    """Four users of two tastes, two items each: one of their taste, bought, and one that is not."""
    rng = np.random.default_rng(step)
    taste_B = rng.integers(0, 2, 4)
    fits_C = np.tile([1, 0], 4)
    items = rng.integers(0, NUM_ITEMS // 2, 8) * 2 + (np.repeat(taste_B, 2) ^ (1 - fits_C))
    return UpstreamExamples(
        users=users_of(rng.integers(1, 6, 4).tolist(), rng, taste_B),
        item_rows_C=torch.from_numpy(items),
        item_offsets=torch.arange(0, 9, 2),
        labels=model.heads.labels(torch.from_numpy(np.where(fits_C, 3, 0)), torch.full((8,), float("nan"))),
        is_taken_C=torch.from_numpy(fits_C.astype(bool)),
    )


def learn(model: UpstreamModel, optimizer: RecommenderOptimizer, steps: range) -> list[float]:
    losses, generator = [], torch.Generator().manual_seed(1)
    for step in steps:
        found = model.learning_pass(examples_of(model, step), generator=generator)
        found.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(found.active)
        losses.append(float(found.loss.detach()))
    return losses


def test_every_user_has_a_vector_of_its_own_history_alone() -> None:
    model, lengths = upstream(), [3, 0, 7, 1]
    users = users_of(lengths, np.random.default_rng(0))
    vectors = model.user_vectors(users)
    assert vectors.shape == (4, CONFIG.width)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    torch.testing.assert_close(vectors.square().mean(1), torch.ones(4), atol=1e-3, rtol=0)
    for number in range(4):
        part = slice(int(users.offsets[number]), int(users.offsets[number + 1]))
        alone = UserBatch(
            rows_L=users.rows_L[part],
            actions_L=users.actions_L[part],
            values_L=users.values_L[part],
            timestamps_ms_L=users.timestamps_ms_L[part],
            offsets=torch.tensor([0, lengths[number]]),
            as_of_ms_B=users.as_of_ms_B[number : number + 1],
        )
        torch.testing.assert_close(model.user_vectors(alone)[0], vectors[number], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changed", ["rows_L", "actions_L", "values_L", "timestamps_ms_L", "as_of_ms_B"])
def test_a_vector_depends_on_all_that_is_read(changed: str) -> None:
    model, users = upstream(), users_of([5], np.random.default_rng(0))
    before: Tensor = getattr(users, changed)
    other = {"rows_L": before.flip(0), "actions_L": 4 - before, "values_L": torch.full_like(before, 5.0)}
    other |= {"timestamps_ms_L": before - 3 * 86_400_000, "as_of_ms_B": before + 7 * 86_400_000}
    after = replace(users, **{changed: other[changed]})
    assert (model.user_vectors(users) - model.user_vectors(after)).abs().max() > 1e-4


def test_it_learns_which_items_a_user_will_take() -> None:
    model = upstream()
    optimizer = RecommenderOptimizer(model, OptimizerConfig(dense_learning_rate=3e-3))
    losses = learn(model, optimizer, range(200))
    assert np.mean(losses[-30:]) < 0.8 * np.mean(losses[:30])
    test = examples_of(model, 10_001)
    with torch.no_grad():
        found = model.learning_pass(test, generator=torch.Generator()).predictions_CK[:, 0]
    assert found[test.is_taken_C].min() > found[~test.is_taken_C].max()


def test_without_next_items_only_the_tasks_are_learned_from() -> None:
    model = upstream(replace(CONFIG, next_item_weight=0.0))
    examples = examples_of(model, 0)
    found = model.learning_pass(examples, generator=torch.Generator())
    torch.testing.assert_close(found.loss, model.heads.loss(found.predictions_CK, examples.labels))
    assert upstream().loss(examples) > found.loss


def test_what_was_not_taken_is_no_next_item() -> None:
    model = upstream()
    examples = replace(examples_of(model, 0), is_taken_C=torch.zeros(8, dtype=torch.bool))
    found = model.learning_pass(examples, generator=torch.Generator())
    torch.testing.assert_close(found.loss, model.heads.loss(found.predictions_CK, examples.labels))


def test_vectors_are_learned_as_they_will_be_worked_out_as_of_the_newest_interaction() -> None:
    model, nothing = upstream(), torch.zeros(0, dtype=torch.int64)
    shown = ShownBatch(
        rows_L=torch.tensor([1, 2, 3]),
        actions_L=torch.ones(3, dtype=torch.int64),
        values_L=torch.full((3,), torch.nan),
        timestamps_ms_L=torch.tensor([10, 20, 30]),
        offsets=torch.tensor([0, 2, 2, 3]),
        shown_rows_C=nothing,
        shown_at_ms_R=torch.tensor([50, 60, 70]),
        shown_offsets=torch.zeros(4, dtype=torch.int64),
    )
    labels = model.heads.labels(nothing, torch.zeros(0))
    examples = UpstreamExamples.of_shown(shown, labels, nothing.bool())
    assert examples.users.as_of_ms_B.tolist() == [20, 60, 30]


def test_a_history_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="max_len is 20"):
        upstream().user_vectors(users_of([21], np.random.default_rng(0)))


def test_a_snapshot_and_its_delta_bring_the_same_vectors(tmp_path: Path) -> None:
    model = upstream()
    optimizer = RecommenderOptimizer(model, OptimizerConfig())
    learn(model, optimizer, range(3))
    publish(tmp_path, model, 1)
    model.items.admit(np.array([10_007]))
    learn(model, optimizer, range(3, 5))
    publish(tmp_path, model, 2)
    reader = UpstreamModel(model.config)
    for version in (1, 2):
        apply_snapshot(reader, load_snapshot(tmp_path, "upstream", version))
    assert reader.snapshot_version == 2
    users = users_of([4, 9], np.random.default_rng(3))
    assert torch.equal(reader.user_vectors(users), model.user_vectors(users))


def publish(root: Path, model: UpstreamModel, version: int) -> None:
    manifest = Manifest(
        model="upstream",
        version=version,
        kind="delta" if version > 1 else "anchor",
        parent=version - 1 if version > 1 else None,
        config_hash=model.config.config_hash(),
        model_config=model.config.as_dict(),
        num_items=model.items.num_items,
        created_at_ms=START_MS,
        watermark_ms=START_MS,
    )
    write_snapshot(root, manifest, model.dense_state(), take_rows(model, manifest.kind))
    model.items.clear_dirty()


def test_a_model_of_another_shape_has_another_hash() -> None:
    config = upstream_model_config(CONFIG, RANKING, ACTIONS)
    same = upstream_model_config(
        replace(CONFIG, max_items=7, num_negatives=3), replace(RANKING, task_weights={"buy": 2.0}), ACTIONS
    )
    assert same.config_hash() == config.config_hash()
    other = upstream_model_config(replace(CONFIG, width=32), RANKING, ACTIONS)
    assert other.config_hash() != config.config_hash()


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="upstream.width = 0: must be between"):
        UpstreamConfig(width=0)
    with pytest.raises(ValueError, match="upstream.num_layers is 0"):
        UpstreamConfig(num_layers=0)
    with pytest.raises(ValueError, match="ranking.tasks is empty"):
        upstream_model_config(CONFIG, RankingSettings(), ACTIONS)
