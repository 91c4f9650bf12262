"""The checker finds what it is there to find: each kind of damage, planted into a run that was right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import pytest

from feature_store.interactions import Interactions
from stream.dead_letters import DeadLetter
from stream.log import Record
from stream.messages import HistoryUpdate
from tests.faults.checker import Observed, Row, check, row_of
from tests.faults.load import EventSource, Truth

SEED: Final = 20_260_800
NUM_RECORDS: Final = 400
BATCH: Final = 25


def sound_run() -> tuple[Truth, Observed]:
    """What a faultless ingest would leave of a drawn log, worked out without any of its code."""
    source = EventSource(SEED, num_partitions=2)
    log: list[Record] = []
    ends = {0: 0, 1: 0}
    for _ in range(NUM_RECORDS):
        sent = source.draw()
        log.append(Record("interactions", sent.partition, ends[sent.partition], 0, sent.key, sent.value, ()))
        ends[sent.partition] += 1
        source.truth.acknowledged.add(sent.value)
    log.sort(key=lambda record: (record.partition, record.offset))
    histories: dict[int, list[tuple[Row, int]]] = {}
    updates: list[HistoryUpdate] = []
    for start in range(0, NUM_RECORDS, BATCH):
        batch = log[start : start + BATCH]
        for partition in (0, 1):
            fresh: list[tuple[int, Row, int]] = []
            for record in batch:
                event = source.truth.valid.get(record.value or b"")
                if record.partition == partition and event is not None:
                    history = histories.setdefault(row_of(event).user_id, [])
                    if row_of(event) not in {row for row, _ in history}:
                        fresh.append((record.offset, row_of(event), len(history)))
                        history.append((row_of(event), len(history)))
            if fresh:
                updates.append(update_of(partition, fresh))
    for history in histories.values():
        history.sort(key=lambda pair: (pair[0].event_time_ms, pair[0].event_key))
    return source.truth, Observed(
        log=log,
        histories=histories,
        num_stored=sum(map(len, histories.values())),
        updates=updates,
        letters=[letter_of(record) for record in log if record.value in source.truth.refused],
        positions=ends,
        sampled_positions=[{0: 0, 1: 0}, {0: 10, 1: 0}, {0: 10, 1: 7}],
    )


def update_of(partition: int, fresh: list[tuple[int, Row, int]]) -> HistoryUpdate:
    offsets = np.array([offset for offset, _, _ in fresh], np.int64)
    rows = [row for _, row, _ in fresh]
    return HistoryUpdate(
        log_id="main",
        partition=partition,
        first_offset=int(offsets[0]),
        last_offset=int(offsets[-1]),
        watermark_ms=0,
        offsets=offsets,
        append_ms=np.zeros(len(fresh), np.int64),
        interactions=Interactions(
            user_id=np.array([row.user_id for row in rows], np.int64),
            item_id=np.array([row.item_id for row in rows], np.int64),
            event_time_ms=np.array([row.event_time_ms for row in rows], np.int64),
            action=np.array([row.action for row in rows], np.uint32),
            value=np.array([row.value for row in rows], np.float32),
            event_key=np.array([row.event_key for row in rows], np.uint64),
            seq=np.array([seq for _, _, seq in fresh], np.uint32),
            arrival_ms=np.zeros(len(fresh), np.int64),
            surface=np.array([row.surface for row in rows], np.uint8),
        ),
    )


def letter_of(record: Record) -> DeadLetter:
    return DeadLetter(
        partition=0,
        offset=record.offset,
        reason="malformed_json",
        field=None,
        error="",
        source_topic="interactions",
        source_partition=record.partition,
        source_offset=record.offset,
        attempts=1,
        refused_at_ms=0,
        key=record.key,
        value=record.value,
        original_headers=(),
    )


def lose_an_interaction(run: Observed) -> Observed:
    user, history = next(iter(run.histories.items()))
    return replace(run, histories={**run.histories, user: history[1:]}, num_stored=run.num_stored - 1)


def store_one_twice(run: Observed) -> Observed:
    user, history = next(iter(run.histories.items()))
    return replace(run, histories={**run.histories, user: [*history[:1], *history]}, num_stored=run.num_stored + 1)


def turn_a_history_round(run: Observed) -> Observed:
    user, history = next(iter(run.histories.items()))
    return replace(run, histories={**run.histories, user: history[::-1]})


def number_two_alike(run: Observed) -> Observed:
    user, history = next(iter(run.histories.items()))
    (first, _), (second, seq), *others = history
    return replace(run, histories={**run.histories, user: [(first, seq), (second, seq), *others]})


def lose_a_record_of_the_log(run: Observed) -> Observed:
    return replace(run, log=run.log[1:])


DAMAGES: Final[dict[str, tuple[Callable[[Observed], Observed], str]]] = {
    "an interaction is lost": (lose_an_interaction, "× lost"),
    "an interaction is stored twice": (store_one_twice, "stored twice"),
    "a history is out of order": (turn_a_history_round, "out of order"),
    "two arrival numbers are alike": (number_two_alike, "arrival numbers"),
    "an acknowledged record is not in the log": (lose_a_record_of_the_log, "acknowledged, but not in the log"),
    "a stranger has a history": (lambda run: replace(run, num_stored=run.num_stored + 1), "of users nobody sent"),
    "an update was never sent": (lambda run: replace(run, updates=run.updates[1:]), "lacks it"),
    "an update was overtaken": (lambda run: replace(run, updates=run.updates[::-1]), "lacks it"),
    "a refused record has no letter": (lambda run: replace(run, letters=run.letters[1:]), "without a dead letter"),
    "a letter has other bytes": (
        lambda run: replace(run, letters=[replace(run.letters[0], value=b"?"), *run.letters[1:]]),
        "other bytes",
    ),
    "a valid record has a letter": (
        lambda run: replace(run, letters=[*run.letters, replace(run.letters[0], source_offset=10**6)]),
        "a dead letter of a record that is valid",
    ),
    "a position lies behind the log's end": (
        lambda run: replace(run, positions={**run.positions, 0: run.positions[0] - 1}),
        "the stored positions are",
    ),
    "a position went back": (
        lambda run: replace(run, sampled_positions=[*run.sampled_positions, {0: 9, 1: 7}]),
        "went back: 10 → 9",
    ),
}


def test_a_sound_run_passes() -> None:
    truth, run = sound_run()
    verdict = check(truth, run)
    assert verdict.problems == []
    assert verdict.num_accepted > 300
    assert verdict.num_refused > 5
    assert verdict.num_rows_sent_again == verdict.num_letters_sent_again == 0


def test_repetitions_are_counted_and_pass() -> None:
    truth, run = sound_run()
    repeated = replace(run, updates=[run.updates[0], *run.updates], letters=[*run.letters, run.letters[0]])
    verdict = check(truth, repeated)
    assert verdict.problems == []
    assert verdict.num_rows_sent_again == len(run.updates[0].offsets)
    assert verdict.num_letters_sent_again == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str) -> None:
    truth, run = sound_run()
    plant, words = DAMAGES[damage]
    problems = check(truth, plant(run)).problems
    assert any(words in problem for problem in problems), problems
