"""A run as it was at a moment: a user's history, the weights kept last, and what they would have recommended."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import msgspec
import numpy as np
import polars as pl

from backtest.engine import STORE_FILE
from backtest.errors import RunFolderError
from backtest.kept_weights import MODEL, SNAPSHOTS
from backtest.queries import Queries, ShownLists, rank_queries
from backtest.run_files import RunFolder
from feature_store.config import FeatureStoreConfig
from feature_store.interactions import JaggedHistories
from feature_store.store import FeatureStore
from model.config import ModelConfig
from model.llatte_ranking_config import LlatteRankingConfig
from model.manifest import Manifest
from model.ranking_network import RankingConfig, RankingModelConfig
from model.recommender import Recommender
from model.snapshot import chain, list_versions, load_snapshot, read_manifest
from model.storage import open_storage
from model.swap import apply_snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What was known of one user, and by which weights what would have been shown."""

    moment_ms: int
    user_id: int
    history: JaggedHistories
    """One row, the newest interactions that had happened and arrived."""
    weights: Manifest | None
    """Of the newest version kept by then; None before the first."""
    shown: ShownLists | None
    """The list of that version; None without weights."""
    item_names: dict[int, str]
    """Texts of the ids in history and list, where ids are hashes."""
    published: list[dict[str, Any]]
    """By arm: its newest publication by then."""


def look_back(run: RunFolder, moment_ms: int, user_id: int, *, max_len: int) -> Moment:
    """Read a run as of a moment. Raises RunFolderError when its store or weights are not there any more."""
    path = run.root / STORE_FILE
    if not path.is_file():
        raise RunFolderError(f"{path} is missing: it holds the histories; run the backtest again with --restart")
    config = _model_config(run)
    store = FeatureStore(FeatureStoreConfig(url=f"sqlite:///{path}"))
    try:
        history = store.read(
            np.array([user_id]), max_len=max(max_len, config.max_len), before_ms=moment_ms + 1, known_at_ms=moment_ms
        )
        weights = _weights_at(run, moment_ms)
        shown = None if weights is None else _shown(run, config, weights, history, moment_ms)
        ids = history.item_id if shown is None else np.concatenate([history.item_id, shown.item_ids_SK[0]])
        names = store.names("item", np.unique(ids[ids >= 0]))
    finally:
        store.close()
    return Moment(
        moment_ms=moment_ms,
        user_id=user_id,
        history=history,
        weights=weights,
        shown=shown,
        item_names=names,
        published=_published_by(run, moment_ms),
    )


def _model_config(run: RunFolder) -> ModelConfig:
    stored = run.manifest.config["model"] | {"seed": run.manifest.seed}
    model, ranking = msgspec.convert(stored, ModelConfig), stored.get("ranking")
    if ranking is None:
        return model
    # The snapshots hold the head as well, and fit no model without it.
    kind: type[LlatteRankingConfig | RankingConfig] = LlatteRankingConfig if "llatte" in ranking else RankingConfig
    given = {one.name: getattr(model, one.name) for one in fields(model)}
    return RankingModelConfig(**given, ranking=msgspec.convert(ranking, kind))


def _weights_at(run: RunFolder, moment_ms: int) -> Manifest | None:
    storage = open_storage(run.root / SNAPSHOTS)
    newest = None
    for version in list_versions(storage, MODEL):
        manifest = read_manifest(storage, MODEL, version)
        if manifest.created_at_ms > moment_ms:
            break
        newest = manifest
    return newest


def _shown(
    run: RunFolder, config: ModelConfig, weights: Manifest, history: JaggedHistories, moment_ms: int
) -> ShownLists:
    storage = open_storage(run.root / SNAPSHOTS)
    model = Recommender(config)
    for version in chain(storage, MODEL, have=None, want=weights.version):
        apply_snapshot(model, load_snapshot(storage, MODEL, version))
    model.eval()
    asked = Queries.of_moment(history, moment_ms, max_len=config.max_len)
    return rank_queries(model, model.catalogue(), asked, only_lists=True).lists


def _published_by(run: RunFolder, moment_ms: int) -> list[dict[str, Any]]:
    newest = run.publications().filter(pl.col("time_ms") <= moment_ms).group_by("arm").last().sort("arm")
    found: list[dict[str, Any]] = newest.collect().to_dicts()
    return found
