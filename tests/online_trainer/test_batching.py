"""Micro-batches: a function of the messages and the budgets; nothing lost, nothing twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.interactions import Interactions
from online_trainer.batching import MicroBatch, MicroBatcher, PartitionPosition
from stream.messages import HistoryUpdate


def update_of(offsets: list[int], *, partition: int = 0, users: list[int] | None = None, seq: int = 0) -> HistoryUpdate:
    n = len(offsets)
    return HistoryUpdate(
        log_id="main",
        partition=partition,
        first_offset=offsets[0],
        last_offset=offsets[-1],
        watermark_ms=0,
        offsets=np.array(offsets, np.int64),
        append_ms=np.array(offsets, np.int64) + 1_000,
        interactions=Interactions(
            user_id=np.array(users or offsets, np.int64),
            item_id=np.array(offsets, np.int64) + 100 * partition,
            event_time_ms=np.array(offsets, np.int64),
            action=np.ones(n, np.uint32),
            value=np.full(n, np.nan, np.float32),
            event_key=np.array(offsets, np.uint64),
            seq=np.full(n, seq, np.uint32),
            arrival_ms=np.zeros(n, np.int64),
        ),
    )


def batcher_of(max_interactions: int = 4, max_tokens: int = 1_000, max_len: int = 8, **positions: int) -> MicroBatcher:
    known = {("main", int(p[1:])): PartitionPosition(0, offset) for p, offset in positions.items()}
    return MicroBatcher(max_interactions=max_interactions, max_tokens=max_tokens, max_len=max_len, positions=known)


def drain(batcher: MicroBatcher) -> list[MicroBatch]:
    batches = []
    while batch := batcher.take():
        batches.append(batch)
    return batches


def test_batches_close_at_the_interaction_budget_and_know_where_to_continue() -> None:
    batcher = batcher_of(max_interactions=4)
    batcher.add(update_of([0, 1, 2]), 70)
    assert not batcher.is_full()
    batcher.add(update_of([3, 5, 6]), 71)
    assert batcher.is_full()
    first, second = drain(batcher)
    assert first.interactions.item_id.tolist() == [0, 1, 2, 3]
    assert first.append_ms.tolist() == [1000, 1001, 1002, 1003]
    # The second message is only half learned: it is where reading continues, above offset 3.
    assert first.positions == {("main", 0): PartitionPosition(71, 4)}
    assert second.interactions.item_id.tolist() == [5, 6]
    assert second.positions == {("main", 0): PartitionPosition(72, 7)}
    assert batcher.take() is None


def test_rows_sent_again_are_dropped_and_counted() -> None:
    batcher = batcher_of(max_interactions=100)
    batcher.add(update_of([0, 1, 2]), 0)
    batcher.add(update_of([0, 1, 2, 3, 4]), 1)
    batcher.add(update_of([2, 3]), 2)
    (batch,) = drain(batcher)
    assert batch.interactions.item_id.tolist() == [0, 1, 2, 3, 4]
    assert batcher.num_repeated == 5


def test_a_resumed_batcher_starts_above_its_positions() -> None:
    batcher = batcher_of(max_interactions=100, p0=2)
    batcher.add(update_of([0, 1, 2, 3]), 0)
    batcher.add(update_of([0, 1], partition=1), 0)
    (batch,) = drain(batcher)
    assert batch.interactions.item_id.tolist() == [100, 101, 2, 3]


def test_the_token_budget_counts_each_history_once() -> None:
    # Users with seq 4 have 5 tokens of history; a second event of the same user adds one token.
    batcher = batcher_of(max_interactions=100, max_tokens=12)
    batcher.add(update_of([0, 1, 2, 3, 4], users=[1, 1, 2, 3, 4], seq=4), 0)
    assert [len(batch.interactions) for batch in drain(batcher)] == [3, 2]


def test_a_history_longer_than_the_budget_still_gets_its_batch() -> None:
    batcher = batcher_of(max_tokens=2)
    batcher.add(update_of([0, 1], seq=7), 0)
    assert [len(batch.interactions) for batch in drain(batcher)] == [1, 1]


def test_a_user_never_has_more_new_interactions_than_a_history_holds() -> None:
    batcher = batcher_of(max_interactions=100, max_len=3)
    batcher.add(update_of([0, 1, 2, 3, 4, 5, 6], users=[5] * 7), 0)
    assert [len(batch.interactions) for batch in drain(batcher)] == [3, 3, 1]


def test_partitions_are_merged_by_append_time() -> None:
    batcher = batcher_of(max_interactions=4)
    batcher.add(update_of([0, 10, 20]), 5)
    batcher.add(update_of([5, 15, 25], partition=1), 9)
    first, second = drain(batcher)
    assert first.interactions.item_id.tolist() == [0, 105, 10, 115]
    assert first.positions == {("main", 0): PartitionPosition(5, 11), ("main", 1): PartitionPosition(9, 16)}
    assert second.interactions.item_id.tolist() == [20, 125]


def test_what_was_announced_of_a_user_before_it_was_forgotten_is_taken_but_not_learned() -> None:
    batcher = batcher_of(max_interactions=3)
    batcher.add(update_of([0, 1, 2], users=[7, 8, 7]), 5)
    batcher.add(update_of([0, 1, 2], users=[7, 8, 7], partition=1), 5)
    batcher.forget(0, (7,), 6)
    batcher.read_up_to(0, 6)
    batcher.add(update_of([3, 4, 5], users=[7, 8, 7]), 7)  # of a new history
    batches = drain(batcher)
    kept = [item for batch in batches for item in batch.interactions.item_id.tolist()]
    dropped = [item for batch in batches for item in batch.dropped.item_id.tolist()]
    assert sorted(kept) == [1, 3, 4, 5, 100, 101, 102]
    assert sorted(dropped) == [0, 2]
    assert all(len(batch.append_ms) == len(batch.interactions) for batch in batches)
    assert {source: at for batch in batches for source, at in batch.positions.items()} == {
        ("main", 0): PartitionPosition(8, 6),
        ("main", 1): PartitionPosition(6, 3),
    }


def test_a_user_who_is_forgotten_further_on_is_dropped_up_to_there() -> None:
    batcher = batcher_of(max_interactions=100)
    batcher.forget(0, (7,), 6)
    for number in range(4, 9):
        batcher.read_up_to(0, number)
        batcher.add(update_of([number], users=[7]), number)
    (batch,) = drain(batcher)
    assert batch.dropped.item_id.tolist() == [4, 5]
    assert batch.interactions.item_id.tolist() == [6, 7, 8]
    assert batcher._forgotten == {0: {}}


def test_offsets_of_two_logs_are_told_apart() -> None:
    batcher = batcher_of(p0=3)
    batcher.add(update_of([1, 2, 3]), 0)
    batcher.add(replace(update_of([0, 1, 2]), log_id="main~1"), 1)
    (batch,) = drain(batcher)
    assert batch.positions == {("main", 0): PartitionPosition(1, 4), ("main~1", 0): PartitionPosition(2, 3)}
    assert len(batch.interactions) == 4
    assert batcher.num_repeated == 2


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=8),
    st.integers(1, 7),
    st.integers(1, 40),
    st.integers(1, 5),
    st.data(),
)
def test_every_row_is_taken_exactly_once_however_messages_are_cut(
    messages: list[list[int]], max_interactions: int, max_tokens: int, max_len: int, data: st.DataObject
) -> None:
    batcher = batcher_of(max_interactions=max_interactions, max_tokens=max_tokens, max_len=max_len)
    next_offset, taken = 0, []
    for number, users in enumerate(messages):
        update = update_of(list(range(next_offset, next_offset + len(users))), users=users)
        next_offset += len(users)
        batcher.add(update, number)
        if data.draw(st.booleans()):
            batcher.add(update, number)
        if data.draw(st.booleans()) and (batch := batcher.take()):
            taken.append(batch)
    taken += drain(batcher)
    rows = [item for batch in taken for item in batch.interactions.item_id.tolist()]
    assert rows == list(range(next_offset))
    assert all(len(batch.interactions) <= max_interactions for batch in taken)
    assert taken[-1].positions["main", 0].source_offset == next_offset


def test_the_limits_are_checked_by_the_configuration() -> None:
    from online_trainer.config import TrainerConfig

    with pytest.raises(ValueError, match=r"trainer.batch_interactions"):
        TrainerConfig(batch_interactions=0)
