"""Streams that change at known places, with the scores that knowing everything would give.

Users belong to clusters. A user's next item group follows from the last one by the cluster's own transitions, and
the item is drawn from the group by weight, never one that the user had before. What changes is this *concept*: where
groups lead, and which of their items are popular. So a model learns from histories, and has to learn anew.

Shapes: N events, K clusters, G groups, V items, item v of group ``v % G``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.dirichlet import DirichletConfig, dirichlet_records
from backtest.ideal import ideal_scores
from backtest.long_range import LongRangeConfig, long_range_stream

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]
Scenario = Literal["stationary", "sudden", "gradual", "recurring", "new_items", "dirichlet", "long_range"]
SCENARIOS: Final[tuple[Scenario, ...]] = get_args(Scenario)

_SUCCESSORS: Final = (0.7, 0.2)
"""Chance of a group's first and second successor; the rest is spread over all groups."""
_GRADUAL_SHARE: Final = 0.2
"""Share of the stream during which a gradual change is under way."""
_DAY_MS: Final = 86_400_000


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatorConfig:
    """A stream. Everything follows from these values: the same ones give the same bytes."""

    scenario: Scenario = "sudden"
    """stationary: nothing changes. sudden: all users follow new habits from one event on. gradual: more and more do.
    recurring: two sets of habits take turns. new_items: waves of new items replace the oldest ones, habits stay.
    dirichlet: no such structure; the catalogue of `backtest.dirichlet` grows from the first event to the last.
    long_range: nor here, and nothing changes; what comes next depends on hundreds of interactions ago
    (`backtest.long_range`)."""
    num_events: int = 60_000
    num_items: int = 600
    num_groups: int = 20
    num_clusters: int = 3
    num_users: int = 400
    """Users who are active at the same time; who leaves is replaced by someone new."""
    interactions_per_user: float = 40.0
    """Mean number of a user's interactions (geometric)."""
    num_changes: int = 1
    """Changes, evenly spread over the stream; ignored by `stationary`, `dirichlet` and `long_range`."""
    wave_share: float = 0.3
    """Of `new_items`: share of the catalogue that each wave replaces."""
    events_per_day: float = 5_000.0
    """Mean events in a day of event time; gaps are exponential."""
    start_ms: int = 1_700_000_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise ValueError(f"scenario = {self.scenario}: one of {', '.join(SCENARIOS)}")
        lowest = {"num_events": 1, "num_groups": 2, "num_clusters": 1, "num_users": 1, "num_changes": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {low}")
        if self.num_items < 20 * self.num_groups:
            raise ValueError(f"num_items = {self.num_items}: at least 20 a group, {20 * self.num_groups}")
        if not 1 <= self.interactions_per_user <= self.num_items / 4:
            raise ValueError(
                f"interactions_per_user = {self.interactions_per_user}: from 1 to a quarter of num_items, since "
                "nobody takes an item twice"
            )
        if not 0 < self.wave_share <= 0.5 or not self.events_per_day > 0:
            raise ValueError("wave_share must lie above 0 and at most at 0.5, events_per_day above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A change of what the stream draws from."""

    kind: Scenario
    first: int
    """Index of the first event that may come from what is new."""
    last: int
    """Index from which on everything does: `first` unless the change is gradual."""
    first_ms: int
    """Event time of `first`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedStream:
    """N events in event-time order, and the truth about them."""

    user_id: Int64s
    item_id: Int64s
    event_time_ms: Int64s
    ideal_hr_at_10: Float64s
    """[N] expected HR@10 of ranking by the true probabilities; NaN for a user's first event, which nobody predicts."""
    ideal_ndcg_at_20: Float64s
    changes: tuple[Change, ...]

    def truth(self, config: SimulatorConfig) -> dict[str, Any]:
        """Configuration, changes and ideal scores between them, JSON-ready."""
        bounds = [0, *sorted({at for change in self.changes for at in (change.first, change.last)}), len(self.item_id)]
        segments = [
            {
                "first": first,
                "end": end,
                "ideal_hr_at_10": _mean(self.ideal_hr_at_10[first:end]),
                "ideal_ndcg_at_20": _mean(self.ideal_ndcg_at_20[first:end]),
            }
            for first, end in itertools.pairwise(bounds)
            if end > first
        ]
        return {
            "config": asdict(config),
            "changes": [asdict(change) for change in self.changes],
            "ideal_hr_at_10": _mean(self.ideal_hr_at_10),
            "ideal_ndcg_at_20": _mean(self.ideal_ndcg_at_20),
            "segments": segments,
        }

    def write(self, path: Path, config: SimulatorConfig) -> Path:
        """Write `path` (parquet, for `headrace replay`) and beside it the truth as JSON; returns the latter's path."""
        frame = pl.DataFrame(
            {
                "user_id": self.user_id,
                "item_id": self.item_id,
                "event_time": self.event_time_ms,
                "ideal_hr_at_10": self.ideal_hr_at_10,
                "ideal_ndcg_at_20": self.ideal_ndcg_at_20,
            }
        )
        truth = path.with_suffix(".truth.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(path)
        truth.write_text(json.dumps(self.truth(config), indent=1) + "\n", encoding="utf-8")
        return truth


def simulate(config: SimulatorConfig) -> SimulatedStream:
    """The stream of a configuration."""
    rng = np.random.default_rng(config.seed)
    if config.scenario == "dirichlet":
        return _dirichlet(config, rng)
    if config.scenario == "long_range":
        return _long_range(config, rng)
    gaps_ms = rng.exponential(_DAY_MS / config.events_per_day, config.num_events)
    time_ms = config.start_ms + gaps_ms.cumsum().astype(np.int64)
    phases = _phases(config, rng)
    changes = tuple(
        Change(kind=config.scenario, first=phase.first, last=phase.last, first_ms=int(time_ms[phase.first]))
        for phase in phases[1:]
    )
    drawn = _Drawn.empty(config.num_events)
    crowd = _Crowd(config, rng)
    for phase, end in zip(phases, [*(one.first for one in phases[1:]), config.num_events], strict=True):
        for index in range(phase.first, end):
            crowd.draw(index, phase, drawn)
    return SimulatedStream(
        user_id=drawn.user_id,
        item_id=drawn.item_id,
        event_time_ms=time_ms,
        ideal_hr_at_10=drawn.hr,
        ideal_ndcg_at_20=drawn.ndcg,
        changes=changes,
    )


@dataclass(frozen=True, slots=True)
class _Concept:
    """probability_KGV: of the next item, by the user's cluster and last group; rows sum to 1."""

    probability_KGV: Float64s
    start_KV: Float64s
    """... of a user's first item."""

    def given(self, cluster: int, last_group: int | None) -> Float64s:
        """[V], a view; last_group: None before the first item."""
        if last_group is None:
            row_V: Float64s = self.start_KV[cluster]
        else:
            row_V = self.probability_KGV[cluster, last_group]
        return row_V

    @classmethod
    def of(cls, transition_KGG: Float64s, weight_V: Float64s) -> _Concept:
        num_groups = transition_KGG.shape[1]
        group_V = np.arange(len(weight_V)) % num_groups
        within_V = weight_V / np.bincount(group_V, weight_V, minlength=num_groups)[group_V]
        start_KV = transition_KGG.mean(1)[:, group_V] * within_V
        return cls(transition_KGG[:, :, group_V] * within_V, start_KV)


@dataclass(frozen=True, slots=True)
class _Phase:
    """From `first` on, events are drawn from `after`; before `last`, some still from `before`."""

    first: int
    last: int
    before: _Concept
    after: _Concept

    def share_after(self, index: int) -> float:
        return 1.0 if index >= self.last else (index - self.first + 1) / (self.last - self.first + 1)


@dataclass(slots=True)
class _Drawn:
    user_id: Int64s
    item_id: Int64s
    hr: Float64s
    ndcg: Float64s

    @classmethod
    def empty(cls, num: int) -> _Drawn:
        return cls(np.empty(num, np.int64), np.empty(num, np.int64), np.full(num, np.nan), np.full(num, np.nan))


class _Crowd:
    """Who is active, and what each of them had."""

    def __init__(self, config: SimulatorConfig, rng: np.random.Generator) -> None:
        self._config, self._rng = config, rng
        self._user_id = np.arange(config.num_users)
        self._next_user = config.num_users
        self._cluster = rng.integers(0, config.num_clusters, config.num_users)
        self._items: list[list[int]] = [[] for _ in range(config.num_users)]

    def draw(self, index: int, phase: _Phase, drawn: _Drawn) -> None:
        """One user takes one item."""
        at = int(self._rng.integers(len(self._items)))
        had = self._items[at]
        probability_V = self._probabilities(at, phase, phase.share_after(index))
        probability_V[had] = 0.0
        bound_V = probability_V.cumsum()
        item = int(np.searchsorted(bound_V, self._rng.random() * bound_V[-1], side="right"))
        drawn.user_id[index], drawn.item_id[index] = self._user_id[at], item
        if had:
            drawn.hr[index], drawn.ndcg[index] = ideal_scores(probability_V / bound_V[-1])
        had.append(item)
        if len(had) > self._config.num_items // 2 or self._rng.random() < 1 / self._config.interactions_per_user:
            self._replace(at)

    def _probabilities(self, at: int, phase: _Phase, share_after: float) -> Float64s:
        """A fresh [V], before what the user had is left out."""
        had = self._items[at]

        def of(concept: _Concept) -> Float64s:
            return concept.given(int(self._cluster[at]), had[-1] % self._config.num_groups if had else None)

        if share_after == 1.0:
            return of(phase.after).copy()
        return share_after * of(phase.after) + (1 - share_after) * of(phase.before)

    def _replace(self, at: int) -> None:
        self._user_id[at] = self._next_user
        self._next_user += 1
        self._cluster[at] = self._rng.integers(self._config.num_clusters)
        self._items[at] = []


def _phases(config: SimulatorConfig, rng: np.random.Generator) -> list[_Phase]:
    """The first from event 0 on, and one per change."""
    concepts = _concepts(config, rng)
    now = next(concepts)
    phases = [_Phase(0, 0, now, now)]
    if config.scenario == "stationary":
        return phases
    length = int(_GRADUAL_SHARE * config.num_events / config.num_changes) if config.scenario == "gradual" else 0
    for number in range(1, config.num_changes + 1):
        first = config.num_events * number // (config.num_changes + 1)
        before, now = now, next(concepts)
        phases.append(_Phase(first, first + length, before, now))
    return phases


def _concepts(config: SimulatorConfig, rng: np.random.Generator) -> Iterator[_Concept]:
    """What each phase draws from, without end."""
    if config.scenario == "new_items":
        yield from _waves(config, rng)
    elif config.scenario == "recurring":
        yield from itertools.cycle([_random_concept(config, rng) for _ in range(2)])
    while True:
        yield _random_concept(config, rng)


def _random_concept(config: SimulatorConfig, rng: np.random.Generator) -> _Concept:
    return _Concept.of(_transitions(config, rng), _weights(config, rng))


def _waves(config: SimulatorConfig, rng: np.random.Generator) -> Iterator[_Concept]:
    """Items come in the order of their ids: a wave brings the next ones, and the oldest of the catalogue go."""
    transition_KGG, weight_V = _transitions(config, rng), _weights(config, rng)
    in_wave = int(config.wave_share * config.num_items / (1 + config.wave_share * config.num_changes))
    num_live = config.num_items - in_wave * config.num_changes
    for wave in itertools.count():
        is_live_V = np.zeros(config.num_items, bool)
        is_live_V[wave * in_wave : wave * in_wave + num_live] = True
        yield _Concept.of(transition_KGG, weight_V * is_live_V)


def _transitions(config: SimulatorConfig, rng: np.random.Generator) -> Float64s:
    K, G = config.num_clusters, config.num_groups
    transition_KGG = np.full((K, G, G), (1 - sum(_SUCCESSORS)) / G)
    for chance in _SUCCESSORS:
        for cluster in range(K):
            transition_KGG[cluster, np.arange(G), rng.permutation(G)] += chance
    return transition_KGG


def _weights(config: SimulatorConfig, rng: np.random.Generator) -> Float64s:
    """1 / rank within the group, ranks at random."""
    G = config.num_groups
    weight_V = np.empty(config.num_items)
    for group in range(G):
        size = len(weight_V[group::G])
        weight_V[group::G] = 1.0 / (1 + rng.permutation(size))
    return weight_V


def _dirichlet(config: SimulatorConfig, rng: np.random.Generator) -> SimulatedStream:
    """Records of `backtest.dirichlet` as users who overlap: its catalogue grows from the first event to the last."""
    record_len = int(config.interactions_per_user)
    num_records = -(-config.num_events // record_len)
    shape = DirichletConfig(
        num_records=num_records,
        num_items=config.num_items,
        record_len=record_len,
        num_categories=min(100, config.num_items // 10),
        seed=config.seed,
    )
    records = dirichlet_records(shape)
    # Record r begins at r, in units of one record after the other, and has num_users beside it.
    starts_RT = np.arange(num_records)[:, None] + np.arange(record_len) * (config.num_users / record_len)
    order = np.argsort(starts_RT.ravel(), kind="stable")[: config.num_events]
    gaps_ms = rng.exponential(_DAY_MS / config.events_per_day, config.num_events)
    time_ms = config.start_ms + gaps_ms.cumsum().astype(np.int64)
    is_first = order % record_len == 0
    whole = Change(kind="dirichlet", first=0, last=config.num_events, first_ms=int(time_ms[0]))
    return SimulatedStream(
        user_id=order // record_len,
        item_id=records.items_RT.ravel()[order],
        event_time_ms=time_ms,
        ideal_hr_at_10=np.where(is_first, np.nan, records.ideal_hr_at_10_RT.ravel()[order]),
        ideal_ndcg_at_20=np.where(is_first, np.nan, records.ideal_ndcg_at_20_RT.ravel()[order]),
        changes=(whole,),
    )


def _long_range(config: SimulatorConfig, rng: np.random.Generator) -> SimulatedStream:
    """Of num_items, a fifth are openers and as many their sequels; a user stays for half as many interactions."""
    num_pairs = config.num_items // 5
    shape = LongRangeConfig(
        num_events=config.num_events,
        num_users=config.num_users,
        num_pairs=num_pairs,
        num_fillers=config.num_items - 2 * num_pairs,
        delay=max(config.num_items // 5, 1),
        interactions_per_user=config.num_items // 2,
    )
    gaps_ms = rng.exponential(_DAY_MS / config.events_per_day, config.num_events)
    stream = long_range_stream(shape, rng)
    return SimulatedStream(
        user_id=stream.user_id,
        item_id=stream.item_id,
        event_time_ms=config.start_ms + gaps_ms.cumsum().astype(np.int64),
        ideal_hr_at_10=stream.ideal_hr_at_10,
        ideal_ndcg_at_20=stream.ideal_ndcg_at_20,
        changes=(),
    )


def _mean(values: Float64s) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
