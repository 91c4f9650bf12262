"""Labels wait for the interactions before them, are cut to steps, dropped with their users, and known again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from feature_store.ids import stable_id
from online_trainer.label_queue import LabelPosition, LabelQueue, LearnedLabels, label_keys
from stream.log import Record
from stream.messages import Labels, encode_message


def record(offset: int, labels: Labels | None = None, *, partition: int = 0, timestamp_ms: int = 1_000) -> Record:
    value = b"{}" if labels is None else encode_message(labels)
    return Record("labels", partition, offset, timestamp_ms, None, value, ())


def labels(number: int = 0, *, num: int = 3, outcome: Any = "not_taken", **other: Any) -> Labels:
    is_taken = outcome == "taken"
    return Labels(
        **{
            "request_id": f"r{number}",
            "user_id": number,
            "shown_at_ms": 500 + number,
            "snapshot_version": 1,
            "outcome": outcome,
            "late": False,
            "items": list(range(10 * number, 10 * number + num)),
            "places": list(range(num)),
            "scores": [None] * num,
            "actions": [4] * num if is_taken else [],
            "event_times_ms": [600] * num if is_taken else [],
            **other,
        }
    )


def queue(*added: Record, batch_items: int = 100, positions: dict[int, LabelPosition] | None = None) -> LabelQueue:
    made = LabelQueue(positions or {}, batch_items=batch_items)
    for one in added:
        made.add(one, read_at_ms=100)
    made.release(101, 0)
    return made


def test_a_label_waits_until_the_updates_before_it_were_read_and_learned_from() -> None:
    waiting = LabelQueue({}, batch_items=10)
    waiting.add(record(0, labels(0)), read_at_ms=100)
    waiting.release(100, num_read=7)  # the update log was read up to when the label was read, not further
    assert not waiting.is_due(7)
    waiting.add(record(1, labels(1)), read_at_ms=110)
    waiting.release(105, num_read=9)
    assert not waiting.is_due(8)
    assert waiting.take(8) is None
    batch = waiting.take(9)
    assert batch is not None
    assert batch.positions == {0: LabelPosition(1)}
    assert waiting.num_pending == 3
    waiting.release(200, num_read=9)
    assert waiting.is_due(9)


def test_what_was_taken_and_what_was_not_is_read_from_the_message() -> None:
    taken = labels(3, num=2, outcome="taken", values=[7.5, None], from_ms=450, user_id="ann", surface=3)
    batch = queue(record(0, taken), record(1, labels(4, num=1))).take(0)
    assert batch is not None
    items = batch.items
    assert items.user_id.tolist() == [stable_id("ann"), 4]
    assert items.shown_at_ms.tolist() == [503, 504]
    assert items.known_before_ms.tolist() == [450, 504]
    assert items.surface.tolist() == [3, 0]
    assert items.offsets.tolist() == [0, 2, 3]
    assert items.action.tolist() == [4, 4, 0]
    assert items.value[:1].tolist() == [7.5]
    assert np.isnan(items.value[1:]).all()


def test_what_was_predicted_at_the_impression_comes_with_its_labels_in_the_order_of_the_tasks() -> None:
    waiting = LabelQueue({}, batch_items=4, tasks=("click", "value"))
    said = {"value": [9.5, None, 1e300], "unheard of": [0.0] * 3, "click": [0.5, None, 0.25]}
    waiting.add(record(0, labels(0, predictions=said)), read_at_ms=100)
    waiting.add(record(1, labels(1, predictions={"click": [0.75] * 3})), read_at_ms=100)
    waiting.add(record(2, labels(2)), read_at_ms=100)
    waiting.release(101, 0)
    parts = [waiting.take(0), waiting.take(0), waiting.take(0)]
    served_CK = np.concatenate([part.served_CK for part in parts if part is not None and part.served_CK is not None])
    nan = np.nan
    expected_CK = [[0.5, 9.5], [nan, nan], [0.25, np.inf], *[[0.75, nan]] * 3, *[[nan, nan]] * 3]
    np.testing.assert_array_equal(served_CK, np.array(expected_CK, np.float32))


def test_a_long_record_takes_several_steps_and_is_continued_in_the_middle() -> None:
    records = [record(5, labels(0, num=7)), record(6, labels(1, num=2))]
    whole = queue(*records, batch_items=4)
    first = whole.take(0)
    assert first is not None
    assert first.positions == {0: LabelPosition(5, 4)}
    second = whole.take(0)
    assert second is not None
    assert second.items.item_id.tolist() == [4, 5, 6, 10]
    assert second.positions == {0: LabelPosition(6, 1)}
    again = queue(*records, batch_items=4, positions=first.positions).take(0)
    assert again is not None
    assert again.items.item_id.tolist() == second.items.item_id.tolist()
    assert again.keys.tolist() == second.keys.tolist()
    assert whole.num_pending == 1


def test_late_labels_are_marked_and_not_measured() -> None:
    batch = queue(record(0, labels(0, outcome="taken", late=True)), record(1, labels(1))).take(0)
    assert batch is not None
    assert batch.is_late.tolist() == [True] * 3 + [False] * 3
    assert batch.items.is_measured.tolist() == [False] * 3 + [True] * 3


def test_labels_of_a_forgotten_user_go_and_those_after_it_stay() -> None:
    waiting = queue(record(0, labels(1), timestamp_ms=10), record(1, labels(2), timestamp_ms=20))
    waiting.forget((1,), 30)
    assert (waiting.num_pending, waiting.num_forgotten) == (3, 3)
    waiting.add(record(2, labels(1), timestamp_ms=25), read_at_ms=100)
    assert (waiting.num_pending, waiting.num_forgotten) == (3, 6)
    waiting.add(record(3, labels(1), timestamp_ms=31), read_at_ms=100)
    assert (waiting.num_pending, waiting.num_forgotten) == (6, 6)


@pytest.mark.parametrize(
    "bad",
    [
        {"items": []},
        {"actions": [1]},
        {"outcome": "taken", "actions": [1, 1, 1], "values": [1.0]},
        {"predictions": {"click": [0.5]}},
        {"shown_at_ms": 2**63},
        {"from_ms": -(2**70)},
        {"outcome": "taken", "actions": [1, 2**32, 1]},
        {"outcome": "taken", "actions": [1, -1, 1]},
        {"outcome": "taken", "actions": [1, 1, 1], "values": [1.0, 1e39, None]},
    ],
)
def test_a_record_that_makes_no_sense_is_counted_and_passed_over(bad: dict[str, Any]) -> None:
    waiting = queue(record(0, labels(0, **bad)), record(1), record(2, labels(2)))
    assert waiting.num_unreadable == 2
    batch = waiting.take(0)
    assert batch is not None
    assert batch.positions == {0: LabelPosition(3)}


def test_a_label_is_its_request_item_and_outcome() -> None:
    items = np.array([5, 6])
    keys = [label_keys(r, o, items).tolist() for r, o in [("a", "taken"), ("a", "not_taken"), ("b", "taken")]]
    assert len({key for pair in keys for key in pair}) == 6
    assert label_keys("a", "taken", items).tolist() == keys[0]


def test_labels_learned_last_are_known_and_older_ones_are_not() -> None:
    learned = LearnedLabels(3)
    learned.add(np.array([1, 2, 3, 4], np.uint64))
    assert learned.are_new(np.array([1, 2, 5, 5, 4], np.uint64)).tolist() == [True, False, True, False, False]
    copy = LearnedLabels(2)
    copy.load_state(learned.state())
    assert copy.are_new(np.array([2, 3, 4], np.uint64)).tolist() == [True, False, False]
