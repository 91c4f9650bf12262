"""The label join against a model that looks at every pair of an impression's item and an interaction, every time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.config import FeatureStoreConfig
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from stream.label_rules import Awaited, LabelConfig
from stream.log import Record
from stream.memory_log import MemoryLog
from tests.feature_store.databases import migrated_database
from tests.stream.label_world import AT_ONCE, World, run

CONFIG = LabelConfig(window_ms=10, allowed_lateness_ms=4, correction_ms=12)
BOTH = Awaited(action=0b11)
USERS, ITEMS = 3, 4


@dataclass
class ModelImpression:
    user: int
    request_id: str
    items: list[int]
    from_ms: int
    first_run: int
    labels: dict[int, str] = field(default_factory=dict)
    """Item → taken | not_taken | late | too_late; absent while nothing is known."""
    known: dict[int, int] = field(default_factory=dict)
    """Item → all actions on it that are known while it is open."""
    is_closed: bool = False
    is_removed: bool = False


@dataclass
class ModelInteraction:
    user: int
    item: int
    at: int
    action: int
    announced_ms: int
    run: int
    """The run in which its update is read."""
    is_stored: bool


@dataclass
class Model:
    """What the labels must be, by brute force."""

    config: LabelConfig
    awaited: Awaited = AT_ONCE
    impressions: list[ModelImpression] = field(default_factory=list)
    interactions: list[ModelInteraction] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    num_runs: int = 0

    def show(self, user: int, request_id: str, items: list[int], at: int) -> None:
        if any((one.user, one.request_id, one.is_removed) == (user, request_id, False) for one in self.impressions):
            self.counts["duplicate_impression"] += 1
            return
        self.impressions.append(ModelImpression(user, request_id, items, at, self.num_runs))

    def run(self, now: int) -> None:
        for one in self.impressions:
            if not one.is_removed:
                self._run_one(one, now)
        self.num_runs += 1

    def _run_one(self, one: ModelImpression, now: int) -> None:
        until = one.from_ms + self.config.window_ms
        closing, removal = self.config.closing_ms(until), self.config.removal_ms(until)
        is_closing = not one.is_closed and now >= closing
        for item in set(one.items):
            for act in self.interactions:
                if (act.user, act.item) != (one.user, item) or not one.from_ms <= act.at < until:
                    continue
                is_announced = act.run == self.num_runs
                is_looked_up = act.is_stored and (one.first_run == self.num_runs or is_closing) and not one.is_closed
                if not is_announced and not is_looked_up:
                    continue
                if not one.is_closed:
                    if item not in one.labels:
                        one.known[item] = one.known.get(item, 0) | act.action
                    if one.known[item] & self.awaited.action == self.awaited.action:
                        one.labels[item] = "taken"
                elif one.labels[item] == "not_taken":
                    is_too_late = all(
                        other.announced_ms > self.config.too_late_ms(until)
                        for other in self.interactions
                        if (other.user, other.item, other.run) == (act.user, act.item, act.run)
                        and one.from_ms <= other.at < until
                    )
                    one.labels[item] = "too_late" if is_too_late else "late"
        if is_closing:
            one.is_closed = True
            for item in one.items:
                one.labels.setdefault(item, "taken" if item in one.known else "not_taken")
        elif one.is_closed and now >= removal:
            one.is_removed = True

    def labels(self) -> Counter[tuple[int, str, int, str]]:
        """(user, request, item, outcome), each as often as it must be written."""
        expected: Counter[tuple[int, str, int, str]] = Counter()
        for one in self.impressions:
            for item in one.items:
                outcome = one.labels.get(item)
                if outcome in {"late", "too_late"}:
                    expected[one.user, one.request_id, item, "not_taken"] += 1
                if outcome in {"taken", "not_taken", "late"}:
                    expected[one.user, one.request_id, item, outcome] += 1
        return expected


users, items, moments = st.integers(0, USERS - 1), st.integers(0, ITEMS - 1), st.integers(-14, 3)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("show"), users, st.lists(items, max_size=4), moments),
        st.tuples(st.just("again"), st.integers(0, 9)),
        st.tuples(st.just("act"), users, items, moments, st.sampled_from([1, 2])),
        st.tuples(st.just("announce"), users, items, moments, st.sampled_from([1, 2])),
        st.tuples(st.just("keep")),
        st.tuples(st.just("pass"), st.sampled_from([1, 2, 5, 14, 30])),
        st.tuples(st.just("run")),
        st.tuples(st.just("restart")),
    ),
    min_size=4,
    max_size=40,
)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    with migrated_database(request.param, tmp_path_factory.mktemp("labels")) as url:
        store = FeatureStore(FeatureStoreConfig(url=url, chunk_len=4))
        yield store
        store.close()


num_examples = 0


class Example:
    """One sequence of operations, on the join and on the model."""

    def __init__(self, store: FeatureStore, config: LabelConfig, awaited: Awaited) -> None:
        global num_examples  # noqa: PLW0603 - examples share a database: each has users and a log of its own
        num_examples += 1
        self.first_user = num_examples * 1_000
        self.world = World(store, config=config, awaited=awaited)
        self.world.log = MemoryLog(self.world.clock, num_partitions=2, log_id=f"log-{num_examples}")
        self.model = Model(config, awaited)
        self.joiner = self.world.joiner()
        self.counts: Counter[str] = Counter()
        self.shown: list[Record] = []
        self.repeated: list[tuple[int, str, list[int], int]] = []
        self.unstored: list[tuple[ModelInteraction, Interactions]] = []

    async def do(self, name: str, *arguments: Any) -> None:
        await getattr(self, f"_{name}")(*arguments)

    async def _show(self, user: int, shown: list[int], ago: int) -> None:
        request_id = f"r{len(self.repeated)}"
        await self._impression(user, request_id, shown, max(self.world.now + ago, 0))

    async def _again(self, number: int) -> None:
        if self.repeated:
            await self._impression(*self.repeated[number % len(self.repeated)])

    async def _impression(self, user: int, request_id: str, shown: list[int], at: int) -> None:
        self.repeated.append((user, request_id, shown, at))
        self.world.show(request_id, self.first_user + user, list(shown), at=at)
        self.model.show(user, request_id, shown, at)

    async def _act(self, user: int, item: int, ago: int, action: int) -> None:
        await self._announce(user, item, ago, action)
        self._store(len(self.unstored) - 1)

    async def _announce(self, user: int, item: int, ago: int, action: int) -> None:
        at = self.world.now + ago
        interaction = self.world.interaction(self.first_user + user, item, at, action=action)
        self.world.announce(interaction)
        one = ModelInteraction(user, item, at, action, self.world.now, self.model.num_runs, is_stored=False)
        self.model.interactions.append(one)
        self.unstored.append((one, interaction))

    async def _keep(self) -> None:
        if self.unstored:
            self._store(0)

    def _store(self, number: int) -> None:
        one, interaction = self.unstored.pop(number)
        self.world.keep(interaction)
        one.is_stored = True

    async def _pass(self, duration_ms: int) -> None:
        self.world.clock.advance(duration_ms)

    async def _run(self) -> None:
        await run(self.joiner)
        self.model.run(self.world.now)

    async def _restart(self) -> None:
        await self._run()
        self.counts += self.joiner.counts
        await self.joiner.close()
        self.joiner = self.world.joiner()

    async def check(self) -> None:
        await self._restart()
        await self.joiner.close()
        written = Counter(
            (message.user_id - self.first_user, message.request_id, item, "late" if message.late else message.outcome)
            for message in self.world.messages()
            for item in message.items
            if isinstance(message.user_id, int)
        )
        assert written == self.model.labels()
        if self.model.awaited == BOTH:
            self._check_actions()
        totals = Counter(outcome for *_, outcome in written.elements())
        too_late = sum(one.labels.get(item) == "too_late" for one in self.model.impressions for item in one.items)
        assert +self.counts == totals + self.model.counts + Counter(too_late=too_late)

    def _check_actions(self) -> None:
        """Both actions, or all there were when the window ended: known to the model without looking at labels."""
        found = {
            (message.user_id - self.first_user, message.request_id, item): actions
            for message in self.world.messages()
            if message.outcome == "taken" and not message.late and isinstance(message.user_id, int)
            for item, actions in zip(message.items, message.actions, strict=True)
        }
        assert found == {
            (one.user, one.request_id, item): one.known[item]
            for one in self.model.impressions
            for item, outcome in one.labels.items()
            if outcome == "taken"
        }


async def play(
    store: FeatureStore, config: LabelConfig, script: list[tuple[Any, ...]], awaited: Awaited = AT_ONCE
) -> None:
    with store.transaction() as transaction:
        left_over = transaction.impressions.due(2**62, 1_000_000)
        transaction.impressions.remove(left_over)
    example = Example(store, config, awaited)
    await example.world.log.create_topics()
    for operation in script:
        await example.do(*operation)
    await example.check()


@settings(max_examples=40)
@given(script=operations)
def test_labels_are_those_of_the_model(store: FeatureStore, script: list[tuple[Any, ...]]) -> None:
    asyncio.run(play(store, CONFIG, script))


@settings(max_examples=40)
@given(script=operations)
def test_labels_that_wait_for_two_actions_are_those_of_the_model(
    store: FeatureStore, script: list[tuple[Any, ...]]
) -> None:
    asyncio.run(play(store, CONFIG, script, BOTH))


@settings(max_examples=15)
@given(script=operations)
def test_small_polls_make_the_same_labels(store: FeatureStore, script: list[tuple[Any, ...]]) -> None:
    # Every interaction is stored when it is announced: with one that is not, it matters which poll brought what.
    script = [("act" if name == "announce" else name, *arguments) for name, *arguments in script]
    asyncio.run(play(store, replace(CONFIG, poll_records=2), script))
