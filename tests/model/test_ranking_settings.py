"""Settings of the ranking head: what they ask for, what they refuse, and which of them need a new model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from model.ranking_model import with_ranking_head
from model.ranking_network import RankingModelConfig
from model.ranking_settings import RankingSettings
from model.recommender import Recommender
from ops.errors import SettingsError
from ops.settings import load

ACTIONS = ("view", "click", "purchase")
MODEL = ModelConfig(embedding_dim=8, num_layers=1, num_heads=1, attention_dim=8, hidden_dim=8, max_len=6)
SETTINGS = RankingSettings(tasks=("purchase", "value>=7.5"))


def test_without_tasks_the_model_is_what_it_is() -> None:
    assert with_ranking_head(MODEL, RankingSettings(), ACTIONS) is MODEL
    assert Recommender(MODEL).ranking is None


def test_tasks_are_actions_and_values_to_be_reached() -> None:
    config = with_ranking_head(MODEL, replace(SETTINGS, task_weights={"purchase": 3.0}), ACTIONS)
    assert isinstance(config, RankingModelConfig)
    purchase, good = config.ranking.tasks
    assert (purchase.action_bit, purchase.value_at_least, purchase.weight) == (2, None, 3.0)
    assert (good.action_bit, good.value_at_least, good.weight) == (None, 7.5, 1.0)


def test_a_task_may_be_the_value_itself_in_a_unit_of_its_own() -> None:
    settings = RankingSettings(tasks=("purchase", "value"), value_center=60.0, value_scale=90.0)
    config = with_ranking_head(MODEL, settings, ACTIONS)
    assert isinstance(config, RankingModelConfig)
    purchase, value = config.ranking.tasks
    assert (value.kind, value.center, value.scale) == ("mse", 60.0, 90.0)
    assert (value.action_bit, value.value_at_least) == (None, None)
    assert (purchase.kind, purchase.center, purchase.scale) == ("bce", 0.0, 1.0)
    assert with_ranking_head(MODEL, replace(settings, value_scale=9.0), ACTIONS).config_hash() != config.config_hash()


def test_an_action_that_is_called_value_is_an_action() -> None:
    assert RankingSettings(tasks=("value",)).targets(("view", "value"))[0].action_bit == 1


def test_what_changes_the_network_needs_a_new_model_and_what_does_not_does_not() -> None:
    own = with_ranking_head(MODEL, SETTINGS, ACTIONS).config_hash()
    assert own != MODEL.config_hash()
    for same in ({"task_weights": {"purchase": 3.0}}, {"score_weights": {"purchase": 3.0}}, {"min_labels": 5}):
        changed: Any = same
        assert with_ranking_head(MODEL, replace(SETTINGS, **changed), ACTIONS).config_hash() == own
    assert with_ranking_head(MODEL, SETTINGS, (*ACTIONS, "share")).config_hash() == own
    for other in ({"tokens": "interleaved"}, {"tasks": ("purchase",)}, {"max_candidates": 9}):
        changed = other
        assert with_ranking_head(MODEL, replace(SETTINGS, **changed), ACTIONS).config_hash() != own


def test_the_rest_of_the_model_starts_out_the_same_with_a_head_and_without() -> None:
    plain, with_head = Recommender(MODEL), Recommender(with_ranking_head(MODEL, SETTINGS, ACTIONS))
    assert with_head.retrieval_parameters().keys() == plain.retrieval_parameters().keys()
    assert not plain.ranking_parameters()
    assert with_head.ranking_parameters()
    for name, parameter in plain.retrieval_parameters().items():
        assert parameter.equal(with_head.retrieval_parameters()[name]), name


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": ("like",)}, "'like': it must be an action of events.actions"),
        ({"tasks": ("value>=high",)}, "a value to be reached"),
        ({"tasks": ("value>=inf",)}, "a value to be reached"),
    ],
)
def test_a_task_about_something_else_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RankingSettings(**settings).targets(ACTIONS)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": ("click", "click")}, "each once"),
        ({"tasks": tuple(map(str, range(17)))}, "at most 16"),
        ({"learn_from": "clicks"}, "must be impressions or interactions"),
        ({"tokens": "single"}, "must be interleaved or merged"),
        ({"tasks": ("click",), "score_weights": {"view": 1.0}}, "names 'view': ranking.tasks are click"),
        ({"tasks": ("click",), "task_weights": {"click": -1.0}}, "not below 0"),
        ({"max_candidates": 0}, "between 1 and"),
        ({"min_labels": -1}, "must not be negative"),
        ({"value_scale": 0.0}, "ranking.value_scale = 0.0: must be a finite number above 0"),
        ({"value_scale": float("nan")}, "ranking.value_scale = nan"),
        ({"value_center": float("inf")}, "ranking.value_center = inf: must be a finite number"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RankingSettings(**settings)


def test_an_encoder_that_cannot_keep_candidates_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="ranking needs hstu or ultra_hstu with silu"):
        with_ranking_head(replace(MODEL, kind="sasrec"), SETTINGS, ACTIONS)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('[ranking]\ntasks = ["buy"]', "ranking.tasks names 'buy'"),
        ("[loss]\naction_weights = {buy = 2.0}", "loss.action_weights names buy"),
        (
            '[events]\nactions = ["rating"]\n[ranking]\ntasks = ["rating"]\nlearn_from = "interactions"',
            "the only action",
        ),
    ],
)
def test_what_contradicts_the_declared_actions_is_refused_when_settings_are_read(
    tmp_path: Path, table: str, says: str
) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text(table)
    with pytest.raises(SettingsError, match=says):
        load(path, environment={})
