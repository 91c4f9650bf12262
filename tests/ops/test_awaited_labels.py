"""What labels wait for follows from what the ranking head predicts."""

from __future__ import annotations

import pytest

from model.ranking_settings import RankingSettings
from ops.awaited_labels import awaited_by
from stream.label_rules import Awaited

ACTIONS = ("view", "click", "purchase")


@pytest.mark.parametrize(
    ("tasks", "actions", "awaited"),
    [
        ((), ACTIONS, Awaited()),
        (("click",), ACTIONS, Awaited(action=0b010)),
        (("click", "purchase"), ACTIONS, Awaited(action=0b110)),
        (("purchase", "value>=8"), ACTIONS, Awaited(action=0b100, value=True)),
        (("value>=8",), ACTIONS, Awaited(value=True)),
        (("click", "value"), ACTIONS, Awaited(action=0b010, value=True)),
        (("click",), ("click",), Awaited()),
        (("value>=8", "rating"), ("rating",), Awaited()),
    ],
)
def test_labels_wait_for_what_is_predicted(tasks: tuple[str, ...], actions: tuple[str, ...], awaited: Awaited) -> None:
    assert awaited_by(RankingSettings(tasks=tasks), actions) == awaited


def test_a_head_that_learns_from_interactions_makes_no_label_wait() -> None:
    assert awaited_by(RankingSettings(tasks=("click",), learn_from="interactions"), ACTIONS) == Awaited()


def test_a_task_about_nothing_declared_is_refused() -> None:
    with pytest.raises(ValueError, match="ranking.tasks names 'like'"):
        awaited_by(RankingSettings(tasks=("like",)), ACTIONS)
