"""What the labels of impressions wait for, of what the ranking head predicts."""

from __future__ import annotations

from collections.abc import Sequence

from model.ranking_settings import RankingSettings
from stream.label_rules import Awaited


def awaited_by(ranking: RankingSettings, actions: Sequence[str]) -> Awaited:
    """Every action and value that the head learns from labels; ValueError for tasks that are about nothing declared.

    Where only one action is declared, what it is and has is known at once: nothing is waited for.
    """
    targets = ranking.targets(actions)
    if ranking.learn_from != "impressions" or len(actions) == 1:
        return Awaited()
    bits = [target.action_bit for target in targets if target.action_bit is not None]
    return Awaited(action=sum(1 << bit for bit in bits), value=len(bits) < len(targets))
