"""What is kept of a user gives the state that computing everything again gives, whatever happened in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kernels.implementations import KernelName
from model.batch import HistoryBatch
from model.config import ModelConfig
from model.recommender import Recommender
from model.transducers import Transducer
from model.user_state import KeptState, UserState, encode_newest, keeps_user_states, window_len

CONFIG = ModelConfig(
    embedding_dim=8, num_layers=3, num_heads=2, attention_dim=3, hidden_dim=5, max_len=12, num_time_buckets=40
)
NUM_ITEMS = 7
History = list[tuple[int, int]]
"""Item row (-1: unknown) and time in ms, in order."""


def build(**options: Any) -> Recommender:
    recommender = Recommender(replace(CONFIG, **options))
    recommender.items.admit(np.arange(NUM_ITEMS))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        recommender.items.weight[:NUM_ITEMS] = torch.randn(NUM_ITEMS, CONFIG.embedding_dim, generator=generator)
        for parameter in recommender.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return recommender.eval()


RECOMMENDER = build()
MIXTURE = (
    Transducer(name="odd", actions=("a",), mask=1, max_len=4, num_layers=1),
    Transducer(name="even", actions=("b", "c"), mask=6),
)
ULTRA: dict[str, dict[str, Any]] = {
    "merged": {"tokens": "merged", "value_thresholds": (1.0, 1.5)},
    "interleaved": {"tokens": "interleaved"},
    "surfaces": {"tokens": "merged", "surfaces": True},
    "newest queries see all": {"attention": "semi_local", "local_attn_len": 2, "global_attn_len": 3},
    "all see oldest keys": {
        "attention": "semi_local",
        "local_attn_len": 2,
        "global_attn_len": 3,
        "global_attn": "oldest_keys",
    },
    "local": {"attention": "semi_local", "local_attn_len": 2, "global_attn_len": 0},
    "no window, newest queries see all": {"attention": "semi_local", "local_attn_len": 0, "global_attn_len": 3},
    "no window, all see oldest keys": {
        "attention": "semi_local",
        "local_attn_len": 0,
        "global_attn_len": 3,
        "global_attn": "oldest_keys",
    },
    "truncated": {"truncated_layers": 2, "truncated_len": 5, "truncated_hop": 3},
    "truncated with each": {"truncated_layers": 1, "truncated_len": 4, "truncated_hop": 1},
    "mixture": {"transducers": MIXTURE},
    "mixture of all": {
        "kind": "ultra_hstu",
        "transducers": MIXTURE,
        "local_attn_len": 1,
        "global_attn_len": 1,
        "truncated_len": 4,
    },
    "all": {
        "kind": "ultra_hstu",
        "surfaces": True,
        "local_attn_len": 2,
        "global_attn_len": 2,
        "truncated_len": 6,
        "truncated_hop": 2,
    },
    "all, interleaved, with bias": {
        "kind": "ultra_hstu",
        "tokens": "interleaved",
        "relative_bias": True,
        "local_attn_len": 3,
        "global_attn_len": 2,
        "truncated_layers": 2,
        "truncated_len": 4,
        "truncated_hop": 3,
    },
}
every_part = pytest.mark.parametrize("options", ULTRA.values(), ids=ULTRA.keys())


def batch_of(histories: list[History], now_ms: int) -> HistoryBatch:
    rows = [row for history in histories for row, _ in history]
    times = [at_ms for history in histories for _, at_ms in history]
    followed = [at_ms for history in histories for at_ms in [*(at for _, at in history[1:]), now_ms]]
    bounds = np.cumsum([0, *(len(history) for history in histories)])
    acts = torch.tensor([(row + at_ms) % 5 for history in histories for row, at_ms in history])
    return HistoryBatch(
        rows_L=torch.tensor(rows),
        timestamps_ms_L=torch.tensor(times),
        query_times_ms_L=torch.tensor(followed),
        offsets=torch.tensor(bounds),
        actions_L=acts | (acts * 7 + torch.tensor(rows)) % 4 << 32,
        values_L=torch.where(acts == 4, torch.nan, acts / 2),
    )


def expected(recommender: Recommender, batch: HistoryBatch) -> torch.Tensor:
    return recommender.encode(batch)[batch.last_positions()]


def check(recommender: Recommender, histories: list[History], known: Sequence[KeptState | None], now_ms: int) -> Any:
    batch = batch_of(histories, now_ms)
    found = encode_newest(recommender, batch, known)
    torch.testing.assert_close(found.u_BD, expected(recommender, batch), rtol=0, atol=1e-5)
    return found


HISTORY: History = [(n % NUM_ITEMS, 1_000_000 + 7_000 * n * n) for n in range(10)]
NOW_MS = 9_000_000


def test_a_repeated_request_computes_the_newest_position_only() -> None:
    first = check(RECOMMENDER, [HISTORY], [None], NOW_MS)
    again = check(RECOMMENDER, [HISTORY], first.states, 100 * NOW_MS)
    assert (first.num_reused_B, again.num_reused_B) == ([0], [len(HISTORY) - 1])
    assert again.states[0] is first.states[0]
    assert not torch.allclose(first.u_BD, again.u_BD, atol=1e-5), "the time of the request must count"


def test_new_interactions_extend_what_is_kept() -> None:
    first = check(RECOMMENDER, [HISTORY[:6]], [None], NOW_MS)
    then = check(RECOMMENDER, [HISTORY], first.states, NOW_MS)
    assert then.num_reused_B == [5]
    assert then.states[0].inputs_IP.shape[1] == then.states[0].layers.shape[1] == len(HISTORY) - 1


def test_behind_a_late_interaction_everything_is_computed_again() -> None:
    first = check(RECOMMENDER, [HISTORY[:8]], [None], NOW_MS)
    late = [*HISTORY[:3], (5, HISTORY[2][1] + 1), *HISTORY[3:]]
    # The third position stays the same, but is followed by another interaction now.
    assert check(RECOMMENDER, [late], first.states, NOW_MS).num_reused_B == [2]


def test_another_history_with_the_same_number_of_interactions_reuses_nothing() -> None:
    first = check(RECOMMENDER, [HISTORY], [None], NOW_MS)
    other = [(row - 1, at_ms) for row, at_ms in HISTORY]
    assert check(RECOMMENDER, [other], first.states, NOW_MS).num_reused_B == [0]


def test_a_history_of_one_interaction_has_nothing_to_keep() -> None:
    first = check(RECOMMENDER, [HISTORY[:1]], [None], NOW_MS)
    assert first.states[0].layers.shape[1] == 0
    assert check(RECOMMENDER, [HISTORY[:2]], first.states, NOW_MS).num_reused_B == [0]


def test_users_of_one_batch_are_told_apart() -> None:
    histories = [HISTORY[:4], HISTORY[2:9], HISTORY[:1], HISTORY]
    first = check(RECOMMENDER, histories[:3], [None] * 3, NOW_MS)
    known = [first.states[0], None, first.states[2], first.states[1]]
    found = check(RECOMMENDER, [HISTORY[:6], HISTORY[1:5], HISTORY[:2], HISTORY[2:]], known, NOW_MS)
    assert found.num_reused_B == [3, 0, 0, 6]


def test_what_is_kept_does_not_hold_the_memory_of_the_batch() -> None:
    state = encode_newest(RECOMMENDER, batch_of([HISTORY] * 8, NOW_MS), [None] * 8).states[0]
    assert isinstance(state, UserState)
    width = CONFIG.num_heads * (CONFIG.attention_dim + CONFIG.hidden_dim)
    assert state.layers.untyped_storage().nbytes() == CONFIG.num_layers * 9 * width * 4
    assert state.num_bytes == state.layers.untyped_storage().nbytes() + 3 * 9 * 8


@pytest.mark.parametrize(
    "options",
    [
        {"relative_bias": False},
        {"affine_norms": True, "gate_only_activation": True, "scaled_scores": True, "concat_output": True},
        {"num_heads": 1, "num_layers": 1},
    ],
)
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_it_holds_for_every_form_of_the_layer(options: dict[str, Any], kernel: KernelName) -> None:
    recommender = build(**options)
    batch = batch_of([HISTORY[:5], HISTORY], NOW_MS)
    first = encode_newest(recommender, batch_of([HISTORY[:3], HISTORY[:7]], NOW_MS), [None, None], kernel=kernel)
    found = encode_newest(recommender, batch, first.states, kernel=kernel)
    assert found.num_reused_B == [2, 6]
    torch.testing.assert_close(found.u_BD, expected(recommender, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"time_embedding": True, "relative_bias": False},
        {"kind": "sasrec"},
        {"attention_activation": "softmax", "relative_bias": False, "hidden_dim": 3},
    ],
)
def test_states_that_the_time_of_a_request_changes_are_not_kept(options: dict[str, Any]) -> None:
    recommender = Recommender(replace(CONFIG, embedding_dim=8, **options))
    assert not keeps_user_states(recommender.config)
    with pytest.raises(ValueError, match="change with the time of the request"):
        encode_newest(recommender, batch_of([HISTORY], NOW_MS), [None])


@st.composite
def lives(draw: st.DrawFn) -> list[History]:
    """What one user's history looked like from request to request: appended to, corrected, cut, forgotten."""
    history: History = []
    seen = []
    row = st.integers(-1, NUM_ITEMS - 1)
    for _ in range(draw(st.integers(2, 6))):
        what = draw(st.sampled_from(["append", "append", "late", "forget", "nothing"]))
        if what == "append":
            for _ in range(draw(st.integers(1, 5))):
                gap_ms = draw(st.sampled_from([0, 1, 999, 60_000, 10_000_000]))
                history = [*history, (draw(row), (history[-1][1] if history else 1_000) + gap_ms)]
        elif what == "late" and history:
            at = draw(st.integers(0, len(history) - 1))
            history = [*history[:at], (draw(row), history[at][1]), *history[at:]]
        elif what == "forget":
            history = [(draw(row), 5_000)]
        seen.append(history)
    return [one for one in seen if one]


@settings(max_examples=60, deadline=None)
@given(st.lists(lives(), min_size=1, max_size=3), st.integers(1, CONFIG.max_len))
def test_whatever_happens_to_histories_the_states_are_those_of_computing_all_again(
    users: list[list[History]], hop: int
) -> None:
    known: dict[int, KeptState] = {}
    for moment in range(max(len(life) for life in users)):
        present = [user for user, life in enumerate(users) if moment < len(life)]
        windows = []
        for user in present:
            history = users[user][moment]
            windows.append(history[-window_len(len(history), max_len=CONFIG.max_len, hop=hop) :])
        if present:
            found = check(RECOMMENDER, windows, [known.get(user) for user in present], 2_000_000_000)
            known.update(zip(present, found.states, strict=True))


@every_part
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_states_are_those_of_computing_all_again_with_each_part_of_ultra_hstu(
    options: dict[str, Any], data: st.DataObject
) -> None:
    recommender = build(**options)
    users = data.draw(st.lists(lives(), min_size=1, max_size=3))
    known: dict[int, KeptState] = {}
    for moment in range(max(len(life) for life in users)):
        present = [user for user, life in enumerate(users) if moment < len(life)]
        windows = [users[user][moment] for user in present]
        windows = [one[-window_len(len(one), max_len=CONFIG.max_len, hop=4) :] for one in windows]
        if present:
            found = check(recommender, windows, [known.get(user) for user in present], 2_000_000_000)
            known.update(zip(present, found.states, strict=True))


@pytest.mark.parametrize(
    ("part", "reused"),
    [
        ("merged", 9),
        ("interleaved", 9),
        ("newest queries see all", 7),
        ("all see oldest keys", 9),
        ("local", 9),
        ("truncated", 9),
    ],
)
def test_as_much_is_reused_as_stays_what_it_was(part: str, reused: int) -> None:
    recommender = build(**ULTRA[part])
    first = check(recommender, [HISTORY], [None], NOW_MS)
    again = check(recommender, [HISTORY], first.states, 100 * NOW_MS)
    assert again.num_reused_B == [reused]
    assert again.states[0] is first.states[0]


def test_truncated_layers_are_computed_again_only_when_they_read_on() -> None:
    recommender = build(**ULTRA["truncated"])
    first = check(recommender, [HISTORY[:6]], [None], NOW_MS)
    then = check(recommender, [HISTORY[:7]], first.states, NOW_MS)
    assert first.states[0].newest is not None
    assert then.states[0].newest is not None
    assert (first.states[0].newest.start, then.states[0].newest.start) == (3, 3)
    kept = first.states[0].newest.layers
    assert torch.equal(then.states[0].newest.layers[:, : kept.shape[1]], kept), "bit by bit: it was not computed"
    moved = check(recommender, [HISTORY[:9]], then.states, NOW_MS).states[0].newest
    assert moved is not None
    assert (moved.start, moved.states_ND.shape[0]) == (6, 2)


@every_part
def test_a_history_that_has_lost_its_newest_is_not_taken_for_the_one_that_was_kept(options: dict[str, Any]) -> None:
    recommender = build(**options)
    first = check(recommender, [HISTORY], [None], NOW_MS)
    for length in (9, 7, 6, 3, 1):
        check(recommender, [HISTORY[:length]], first.states, NOW_MS)


def test_a_transducer_computes_nothing_anew_for_interactions_that_it_does_not_read() -> None:
    recommender = build(**ULTRA["mixture"])
    batch = batch_of([HISTORY], NOW_MS)
    assert batch.actions_L is not None
    batch.actions_L[:] = torch.tensor([1, 2, 1, 2, 1, 2, 1, 1, 4, 4])
    first = encode_newest(recommender, batch.take(torch.arange(8)), [None])
    again = encode_newest(recommender, batch, first.states)
    assert (first.num_reused_B, first.num_computed_B) == ([0], [7])  # 5 are odd, of which it reads 4; 3 are even
    # Of the odd ones the newest sees the time of the request; of the even ones it did, and is followed by two.
    assert (again.num_reused_B, again.num_computed_B) == ([5], [4])
    torch.testing.assert_close(again.u_BD, expected(recommender, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", [8, 1 << 32], ids=["action", "surface"])
@pytest.mark.parametrize("tokens", ["merged", "interleaved"])
def test_a_history_in_which_something_else_was_done_is_computed_again_from_there(tokens: Any, changed: int) -> None:
    recommender = build(tokens=tokens, surfaces=True)
    batch = batch_of([HISTORY], NOW_MS)
    first = encode_newest(recommender, batch, [None])
    assert batch.actions_L is not None
    actions_L = batch.actions_L.clone()
    actions_L[6] ^= changed
    other = replace(batch, actions_L=actions_L)
    found = encode_newest(recommender, other, first.states)
    assert found.num_reused_B == [6]
    torch.testing.assert_close(found.u_BD, expected(recommender, other), rtol=0, atol=1e-5)


def test_the_window_moves_in_hops_and_is_never_longer_than_the_model_reads() -> None:
    lengths = [window_len(n, max_len=12, hop=4) for n in range(25)]
    assert lengths[:13] == list(range(13))
    assert lengths[13:] == [9, 10, 11, 12] * 3
    assert [window_len(n, max_len=12, hop=1) for n in (11, 12, 13, 400)] == [11, 12, 12, 12]
    assert window_len(13, max_len=12, hop=12) == 1
