"""A moment of a run is what was known then, and what was shown then."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from backtest.run_files import ArmInfo, RunFolder, RunManifest, write_manifest
from backtest.time_travel import look_back
from model.llatte_config import LlatteSettings
from model.ranking_model import with_ranking_head
from model.ranking_settings import RankingSettings
from tests.backtest.conftest import LEARNER, START_MS, parts, run, table, walks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that keeps the weights of every batch."""
    root = tmp_path_factory.mktemp("run")
    outcome = run(parts(root, walks(500), keep_weights_every="1ms", warm_up_share=0.0))
    write_manifest(root, manifest_of({"model": asdict(LEARNER.model)}, outcome.num_parts))
    return RunFolder.open(root)


def manifest_of(config: dict[str, Any], num_parts: int) -> RunManifest:
    return RunManifest(
        name="walks",
        is_complete=True,
        created_at="2026-01-01T00:00:00Z",
        config=config,
        lineage={},
        seed=LEARNER.model.seed,
        arms=[ArmInfo(name="online-batch", kind="online", title="Online", publish_every_ms=0)],
        num_parts=num_parts,
    )


def test_a_history_is_what_had_happened(folder: RunFolder) -> None:
    log = walks(500)
    for event in (0, 100, 499):
        moment_ms, user = int(log.time_ms[event]), int(log.user_id[event])
        had = log.item_id[(log.user_id == user) & (log.time_ms <= moment_ms)]
        assert look_back(folder, moment_ms, user, max_len=100).history.item_id.tolist() == had.tolist()


def test_what_is_shown_is_what_the_run_had_shown(folder: RunFolder) -> None:
    queries = table(folder.root, "queries")
    lists = table(folder.root, "lists/online-batch").join(queries, on="event")
    alike = []
    for row in lists.tail(30).iter_rows(named=True):
        moment = look_back(folder, row["event_time_ms"] - 1, row["user_id"], max_len=6)
        assert moment.weights is not None
        assert moment.shown is not None
        assert moment.weights.watermark_ms < row["event_time_ms"]
        # A step reads max_len of a user; of several interactions in one step all but the last see less of it.
        alike.append(moment.shown.item_ids_SK[0, 0] == row["item_ids"][0])
        assert moment.published[0]["time_ms"] < row["event_time_ms"]
    assert np.mean(alike) > 0.8


@pytest.mark.parametrize("kind", ["hstu", "llatte"])
def test_weights_with_a_ranking_head_are_looked_back_at_too(tmp_path: Path, kind: Any) -> None:
    ranking = RankingSettings(kind=kind, tasks=("click",), learn_from="interactions")
    llatte = LlatteSettings(num_layers=1, num_heads=2, latent_dim=8, head_dim=4, ffn_dim=16)
    head = with_ranking_head(LEARNER.model, ranking, ("click", "buy"), llatte)
    learner = replace(LEARNER, model=head, ranking=ranking, actions=("click", "buy"))
    outcome = run(parts(tmp_path, walks(200), learner=learner, keep_weights_every="1ms", warm_up_share=0.0))
    config = msgspec.json.decode(msgspec.json.encode({"model": learner.model}))
    write_manifest(tmp_path, manifest_of(config, outcome.num_parts))
    log = walks(200)
    moment = look_back(RunFolder.open(tmp_path), int(log.time_ms[-1]), int(log.user_id[-1]), max_len=6)
    assert moment.shown is not None
    assert moment.shown.item_ids_SK[0, 0] >= 0


def test_before_anything_was_known_nothing_is_shown(folder: RunFolder) -> None:
    moment = look_back(folder, START_MS - 1, 3, max_len=5)
    assert moment.history.num_interactions == 0
    assert moment.weights is None
    assert moment.published == []
