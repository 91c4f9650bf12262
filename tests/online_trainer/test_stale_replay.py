"""Replay of older interactions: a share, the stale ones above all, never what is new, overtaken, or tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from feature_store.store import FeatureStore
from model.batch import Targets
from online_trainer.checkpoint import read_newest_checkpoint, write_checkpoint
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.stale_replay import StaleReplay
from tests.online_trainer.conftest import MODEL, record_stream, walks
from tests.online_trainer.row_moves import moves_without
from tests.online_trainer.test_learner import assert_equal, run

OLDER = Targets(positions_P=torch.arange(38), rows_P=torch.arange(1, 39))
"""Each of 38 positions leads to another item."""


def choose(replay: StaleReplay, count: int, *, seed: int = 0) -> Targets:
    return replay.choose(OLDER, count, now_ms=1_000_000, generator=torch.Generator().manual_seed(seed))


def test_as_many_as_asked_for_are_chosen_if_there_are_so_many() -> None:
    for count, chosen in ((0, 0), (8, 8), (38, 38), (100, 38)):
        assert choose(StaleReplay(), count).rows_P.shape == (chosen,)


def test_each_position_keeps_its_item_and_comes_once() -> None:
    for seed in range(20):
        found = choose(StaleReplay(), 18, seed=seed)
        assert found.rows_P.tolist() == [position + 1 for position in found.positions_P.tolist()]
        assert len(set(found.positions_P.tolist())) == 18


def test_what_has_not_been_learned_for_long_comes_first() -> None:
    replay = StaleReplay()
    replay.learned(torch.arange(41), 999_990)  # ten milliseconds ago ...
    replay.learned(torch.tensor([7, 23]), 0)  # ... and a thousand seconds
    for seed in range(20):
        assert choose(replay, 2, seed=seed).rows_P.tolist() == [7, 23]
    replay.learned(torch.tensor([7, 23]), 1_000_000)
    assert all(choose(replay, 2, seed=seed).rows_P.tolist() != [7, 23] for seed in range(20))


def test_what_is_kept_by_row_follows_the_rows() -> None:
    replay = StaleReplay()
    replay.learned(torch.arange(4), 5)
    replay.learned(torch.tensor([3]), 9)
    replay.follow(moves_without([1], num_before=4))
    assert replay.state()["learned_ms"][:4].tolist() == [5, 9, 5, 0]


def test_nothing_is_counted_twice(store: FeatureStore) -> None:
    stream = record_stream(store, walks(600))
    without, with_it = (run(stream, stream.learner(replay_share=share)) for share in (0.0, 0.5))
    assert without.ledger.num_replayed == 0
    # As many as are new, but for the first steps, whose histories hold too little.
    assert 0.7 * with_it.ledger.num_supervised < with_it.ledger.num_replayed <= with_it.ledger.num_supervised
    with_it.ledger.num_replayed = 0
    assert with_it.ledger == without.ledger
    counts = [one.metrics_summary()["model.lifetime.count"] for one in (without, with_it)]
    assert counts[0] == counts[1]


def test_a_run_with_replay_continues_from_a_checkpoint_bit_by_bit(store: FeatureStore, tmp_path: Path) -> None:
    stream = record_stream(store, walks(500, num_items=120))
    settings: dict[str, Any] = {
        "batch_interactions": 16,
        "replay_share": 0.4,
        "items": ItemsConfig(retired_share=0.2),
        "max_items": 60,
    }
    unbroken = run(stream, stream.learner(**settings))
    assert unbroken.ledger.num_items_retired > 0
    write_checkpoint(tmp_path, run(stream, stream.learner(**settings), steps=13).capture_checkpoint(), keep=1)
    checkpoint = read_newest_checkpoint(tmp_path, config_hash=MODEL.config_hash())
    assert checkpoint is not None
    continued = stream.learner(**settings)
    continued.load_checkpoint(checkpoint)
    assert_equal(unbroken.capture_checkpoint(), run(stream, continued).capture_checkpoint())


def test_the_drift_reaction_decides_over_the_setting(store: FeatureStore) -> None:
    stream = record_stream(store, walks(200))
    learner = stream.learner(replay_share=0.5)
    learner.drift._replay_from = 0  # its share is 0 by default
    assert run(stream, learner).ledger.num_replayed == 0


def test_a_share_of_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="replay_share"):
        TrainerConfig(replay_share=1.0)
