"""What the LLaTTE ranker adds to a model: the counterpart of ``RankingConfig``."""

from __future__ import annotations

from dataclasses import dataclass

from model.action_heads import ActionTask
from model.llatte_config import LlatteSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class LlatteRankingConfig:
    """A ranker that reads a short history, candidates, the request and the user's vector from upstream."""

    tasks: tuple[ActionTask, ...]
    """What is predicted about a candidate."""
    num_actions: int
    """Kinds of action in a history; kind k is bit k of an interaction's actions."""
    llatte: LlatteSettings
    """What a person sets."""
    upstream_width: int
    """Numbers in a user's vector."""
    value_thresholds: tuple[float, ...] = ()
    """Thresholds of an interaction's value that its token tells apart."""
    surfaces: bool = False
    """Whether where an interaction happened is part of its token, and where the request comes from of its own."""
    task_hidden_dim: int = 64
    """Width of the hidden layer that the tasks share."""
    max_candidates: int = 64
    """Candidates of one user in one pass at most."""

    def __post_init__(self) -> None:
        for name in ("upstream_width", "task_hidden_dim", "max_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
