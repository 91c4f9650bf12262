"""What is known about items besides their interactions travels with their rows, where a model reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.errors import StateMismatchError
from model.item_table import CONTENT_DIM, ItemTable
from model.llatte_config import LlatteSettings
from model.manifest import Manifest
from model.ranking_model import with_ranking_head
from model.ranking_settings import RankingSettings
from model.recommender import Recommender
from model.snapshot import Snapshot, load_snapshot, write_snapshot
from model.swap import apply_snapshot, merge_deltas, take_rows, undo_snapshot

MODEL = ModelConfig(embedding_dim=8, max_len=6, max_items=100)
RANKING = RankingSettings(kind="llatte", tasks=("like",), max_candidates=3)


def recommender_of(content: bool = True) -> Recommender:
    settings = LlatteSettings(content=content)
    return Recommender(with_ranking_head(MODEL, RANKING, ("view", "like"), settings, upstream_width=4))


def about(seed: int, num: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num, CONTENT_DIM))
    unit: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def publish(root: Path, model: Recommender, version: int, kind: str) -> Snapshot:
    manifest = Manifest(
        model="m",
        version=version,
        kind=kind,  # type: ignore[arg-type]
        parent=version - 1 if kind == "delta" else None,
        config_hash=model.config.config_hash(),
        model_config=model.config.as_dict(),
        num_items=model.items.num_items,
        created_at_ms=0,
        watermark_ms=0,
    )
    write_snapshot(root, manifest, model.dense_state(), take_rows(model, manifest.kind))
    model.items.clear_dirty()
    return load_snapshot(root, "m", version)


def test_anchors_deltas_merged_deltas_and_the_way_back_carry_it(tmp_path: Path) -> None:
    model = recommender_of()
    model.items.describe(model.items.admit(np.arange(5)), about(0, 5))
    anchor = publish(tmp_path, model, 1, "anchor")
    model.items.describe(np.array([1]), about(1, 1))
    deltas = [publish(tmp_path, model, 2, "delta")]
    assert deltas[0].rows.ids.tolist() == [1]
    model.items.describe(model.items.admit(np.array([77, 3])), about(2, 2))
    deltas.append(publish(tmp_path, model, 3, "delta"))
    one_by_one, merged = recommender_of(), recommender_of()
    for reader in (one_by_one, merged):
        apply_snapshot(reader, anchor)
    before = merged.items.content[:5].clone()
    for delta in deltas:
        apply_snapshot(one_by_one, delta)
    undo = apply_snapshot(merged, merge_deltas(deltas))
    for reader in (one_by_one, merged):
        assert torch.equal(reader.items.content[:6], model.items.content[:6])
    undo_snapshot(merged, undo)
    assert torch.equal(merged.items.content[:5], before)


def test_only_what_changes_is_told_again() -> None:
    items = recommender_of().items
    rows, content = items.admit(np.arange(4)), about(0, 4)
    items.describe(rows, content)
    items.clear_dirty()
    items.describe(rows, content)
    assert items.dirty_rows().tolist() == []
    items.describe(rows[2:], about(1, 2))
    assert items.dirty_rows().tolist() == [2, 3]


def test_rows_are_read_back_and_unknown_ones_are_zeros() -> None:
    items, content = recommender_of().items, about(0, 2)
    items.describe(items.admit(np.arange(2)), content)
    found = items.content_of(torch.tensor([1, -1]))
    assert found is not None
    np.testing.assert_allclose(found[0].numpy(), content[1], atol=3e-4)
    assert found[1].tolist() == [0.0] * CONTENT_DIM
    items.remove(np.array([0]))
    moved = items.content_of(torch.tensor([0]))
    assert moved is not None
    np.testing.assert_allclose(moved[0].numpy(), content[1], atol=3e-4)


def test_a_table_is_restored_with_it() -> None:
    items = recommender_of().items
    items.describe(items.admit(np.arange(3)), about(0, 3))
    again = items.alike()
    again.load_state_dict(items.state_dict())
    assert torch.equal(again.content[:3], items.content[:3])
    with pytest.raises(StateMismatchError):
        ItemTable(MODEL).load_state_dict(items.state_dict())


def test_a_model_that_reads_none_keeps_none(tmp_path: Path) -> None:
    model = recommender_of(content=False)
    rows = model.items.admit(np.arange(3))
    model.items.describe(rows, about(0, 3))
    assert model.items.content_of(torch.from_numpy(rows)) is None
    assert "content" not in model.items.state_dict()
    snapshot = publish(tmp_path, model, 1, "anchor")
    assert snapshot.rows.content is None
    apply_snapshot(recommender_of(content=False), snapshot)


def test_rows_without_it_do_not_fit_a_model_that_reads_it(tmp_path: Path) -> None:
    model = recommender_of()
    model.items.admit(np.arange(3))
    snapshot = publish(tmp_path, model, 1, "anchor")
    bare = replace(snapshot, rows=replace(snapshot.rows, content=None))
    with pytest.raises(StateMismatchError, match="content of rows is 0 wide, not 64"):
        apply_snapshot(recommender_of(), bare)
