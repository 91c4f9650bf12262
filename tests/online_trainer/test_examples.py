"""Which positions of a history predict a new interaction: each exactly once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from feature_store.interactions import SURFACE_SHIFT, Interactions, JaggedHistories, acts_of
from model.action_encoder import NUM_SURFACES, STORED_ACTIONS
from model.transducers import ALL_ACTIONS
from online_trainer.examples import Examples, build_examples

MAX_LEN = 4


def histories_of(rows: dict[int, list[int]]) -> JaggedHistories:
    """One history a user; each interaction given by its seq, item id = 10 * user + seq, time = position."""
    seqs = [seq for row in rows.values() for seq in row]
    users = [user for user, row in rows.items() for _ in row]
    times = [time for row in rows.values() for time in range(len(row))]
    return JaggedHistories(
        user_ids=np.array(list(rows), np.int64),
        offsets=np.cumsum([0, *(len(row) for row in rows.values())]).astype(np.int64),
        item_id=np.array(users, np.int64) * 10 + np.array(seqs, np.int64),
        event_time_ms=np.array(times, np.int64),
        action=np.ones(len(seqs), np.uint32),
        value=np.zeros(len(seqs), np.float32),
        event_key=np.arange(len(seqs), dtype=np.uint64),
        seq=np.array(seqs, np.uint32),
        arrival_ms=np.zeros(len(seqs), np.int64),
    )


def new_of(*pairs: tuple[int, int]) -> Interactions:
    users, seqs = [p[0] for p in pairs], [p[1] for p in pairs]
    n = len(pairs)
    return Interactions(
        user_id=np.array(users, np.int64),
        item_id=np.array([10 * u + s for u, s in pairs], np.int64),
        event_time_ms=np.zeros(n, np.int64),
        action=np.ones(n, np.uint32),
        value=np.zeros(n, np.float32),
        event_key=np.zeros(n, np.uint64),
        seq=np.array(seqs, np.uint32),
        arrival_ms=np.zeros(n, np.int64),
    )


def build(rows: dict[int, list[int]], *new: tuple[int, int]) -> Examples:
    return build_examples(histories_of(rows), new_of(*new), max_len=MAX_LEN)


def test_only_new_interactions_are_targets() -> None:
    examples = build({1: [0, 1, 2], 2: [0, 1]}, (1, 2), (2, 1))
    assert examples.item_id.tolist() == [10, 11, 20]
    assert examples.offsets.tolist() == [0, 2, 3]
    assert examples.positions.tolist() == [1, 2]
    assert examples.target_item_id.tolist() == [12, 21]
    assert examples.query_time_ms.tolist() == [1, 2, 1]
    assert (examples.num_first, examples.num_out_of_reach) == (0, 0)


def test_a_first_interaction_has_nothing_that_predicts_it() -> None:
    examples = build({1: [0], 2: [0, 1]}, (1, 0), (2, 0), (2, 1))
    assert examples.target_item_id.tolist() == [21]
    assert (examples.num_first, examples.num_out_of_reach) == (2, 0)


def test_several_new_interactions_of_a_user_share_one_row() -> None:
    examples = build({3: [0, 1, 2, 3]}, (3, 1), (3, 2), (3, 3))
    assert examples.offsets.tolist() == [0, 3]
    assert examples.target_item_id.tolist() == [31, 32, 33]


def test_a_late_interaction_is_predicted_from_what_lies_before_it() -> None:
    # seq 3 arrived last but belongs between the first and the second interaction.
    examples = build({1: [0, 3, 1, 2]}, (1, 3))
    assert examples.positions.tolist() == [0]
    assert examples.target_item_id.tolist() == [13]


def test_what_is_overtaken_by_something_earlier_in_its_own_step_is_not_predicted_from_it() -> None:
    # seq 2 and 3 are new; 3 arrived last and happened before 2, so the history of 2 holds what nobody knew at its time.
    examples = build({1: [0, 1, 3, 2], 2: [0, 1]}, (1, 2), (1, 3), (2, 1))
    assert examples.target_item_id.tolist() == [13, 21]
    assert (examples.num_first, examples.num_out_of_reach) == (0, 1)


def test_what_no_longer_fits_the_window_is_counted_as_out_of_reach() -> None:
    # The window holds max_len + 1; its head has lost its predecessors, and seq 0 fell out altogether.
    examples = build({1: [1, 2, 3, 4, 5]}, (1, 0), (1, 1), (1, 5))
    assert examples.target_item_id.tolist() == [15]
    assert (examples.num_first, examples.num_out_of_reach) == (0, 2)


@given(
    st.dictionaries(st.integers(0, 9), st.permutations(range(5)).map(lambda p: list(p)[:4]), min_size=1, max_size=5),
    st.data(),
)
def test_every_new_interaction_is_accounted_for_once(rows: dict[int, list[int]], data: st.DataObject) -> None:
    stored = [(user, seq) for user, row in rows.items() for seq in row]
    new = data.draw(st.lists(st.sampled_from(stored), unique=True, min_size=1))
    examples = build(rows, *new)
    # Predicted is what has something before it, all of which had arrived before it.
    predicted = [(u, s) for u, s in new if (before := rows[u][: rows[u].index(s)]) and max(before) < s]
    assert sorted(examples.target_item_id.tolist()) == sorted(10 * u + s for u, s in predicted)
    assert len(examples.positions) + examples.num_first + examples.num_out_of_reach == len(new)


def test_models_find_the_surface_where_histories_put_it() -> None:
    assert (SURFACE_SHIFT, ALL_ACTIONS) == (STORED_ACTIONS, (1 << STORED_ACTIONS) - 1)
    acts = acts_of(np.array([2**32 - 1, 4], np.uint32), np.array([255, 0], np.uint8))
    assert [(each >> STORED_ACTIONS) % NUM_SURFACES for each in acts.tolist()] == [255, 0]
    assert [each & ALL_ACTIONS for each in acts.tolist()] == [2**32 - 1, 4]
