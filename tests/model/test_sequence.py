"""Histories and candidates become tokens in the right order, and no prediction sees the action it is to predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.sequence import Candidates, Interactions, TokenSequence, interleaved, merged

WIDTH = 6
LENGTHS = [3, 0, 1, 4]
NUM_CANDIDATES = [2, 3, 0, 1]
NO_ACTION = torch.full((WIDTH,), 0.25, dtype=torch.float64)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def history_of(lengths: list[int] = LENGTHS, *, seed: int = 0) -> Interactions:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), WIDTH)
    return Interactions(
        item_LD=torch.randn(shape, dtype=torch.float64, generator=generator),
        action_LD=torch.randn(shape, dtype=torch.float64, generator=generator),
        timestamps_ms_L=1_700_000_000_000 + torch.arange(shape[0]),
        offsets=offsets_of(lengths),
    )


def candidates_of(numbers: list[int] = NUM_CANDIDATES, *, seed: int = 1) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    return Candidates(
        item_CD=torch.randn(sum(numbers), WIDTH, dtype=torch.float64, generator=generator),
        request_times_ms_B=1_800_000_000_000 + torch.arange(len(numbers)),
        offsets=offsets_of(numbers),
    )


def merged_with_dummy(history: Interactions, candidates: Candidates | None) -> TokenSequence:
    return merged(history, candidates, NO_ACTION)


Build = Callable[[Interactions, Candidates | None], TokenSequence]
BUILDS: dict[str, Build] = {"interleaved": interleaved, "merged": merged_with_dummy}
both = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())


def rows_of(sequence: TokenSequence, values: Tensor) -> list[Tensor]:
    return list(torch.split(values, sequence.offsets.diff().tolist()))


def expected_rows(history: Interactions, candidates: Candidates, build: Build) -> list[Tensor]:
    rows = []
    for b in range(history.offsets.shape[0] - 1):
        tokens = []
        for i in range(int(history.offsets[b]), int(history.offsets[b + 1])):
            item, action = history.item_LD[i], history.action_LD[i]
            tokens += [item, action] if build is interleaved else [item + action]
        for c in range(int(candidates.offsets[b]), int(candidates.offsets[b + 1])):
            item = candidates.item_CD[c]
            tokens.append(item if build is interleaved else item + NO_ACTION)
        rows.append(torch.stack(tokens) if tokens else torch.zeros(0, WIDTH, dtype=torch.float64))
    return rows


@both
@pytest.mark.parametrize(
    ("lengths", "numbers"),
    [(LENGTHS, NUM_CANDIDATES), ([2], [0]), ([0], [2]), ([0, 0], [0, 0]), ([5, 1], [1, 4])],
    ids=str,
)
def test_rows_hold_the_history_and_then_the_candidates(build: Build, lengths: list[int], numbers: list[int]) -> None:
    history, candidates = history_of(lengths), candidates_of(numbers)
    sequence = build(history, candidates)
    want = expected_rows(history, candidates, build)
    assert sequence.offsets.diff().tolist() == [len(row) for row in want]
    for got_row, want_row in zip(rows_of(sequence, sequence.x_TD), want, strict=True):
        assert torch.equal(got_row, want_row)
    assert sequence.num_targets_B.tolist() == numbers


@both
def test_positions_name_the_tokens_of_items_and_candidates(build: Build) -> None:
    history, candidates = history_of(), candidates_of()
    sequence = build(history, candidates)
    items, asked = sequence.x_TD[sequence.item_positions_L], sequence.x_TD[sequence.candidate_positions_C]
    assert torch.equal(items, history.item_LD + (0 if build is interleaved else history.action_LD))
    assert torch.equal(asked, candidates.item_CD + (0 if build is interleaved else NO_ACTION))


def test_actions_are_predicted_at_items_when_interleaved_and_at_candidates_always() -> None:
    sequence = interleaved(history_of(), candidates_of())
    content = [row.int().tolist() for row in rows_of(sequence, sequence.content_T)]
    assert content == [[1, 0, 1, 0, 1, 0, 1, 1], [1, 1, 1], [1, 0], [1, 0, 1, 0, 1, 0, 1, 0, 1]]
    sequence = merged_with_dummy(history_of(), candidates_of())
    content = [row.int().tolist() for row in rows_of(sequence, sequence.content_T)]
    assert content == [[0, 0, 0, 1, 1], [1, 1, 1], [0], [0, 0, 0, 0, 1]]


def test_targets_share_the_place_after_the_history_and_the_time_of_the_request() -> None:
    sequence = interleaved(history_of(), candidates_of())
    places = [row.tolist() for row in rows_of(sequence, sequence.places())]
    assert places == [[0, 1, 2, 3, 4, 5, 6, 6], [0, 0, 0], [0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
    times = [row.tolist() for row in rows_of(sequence, sequence.timestamps_ms_T)]
    start, request = 1_700_000_000_000, 1_800_000_000_000
    assert times[0] == [start, start, start + 1, start + 1, start + 2, start + 2, request, request]
    assert times[1] == [request + 1] * 3


@both
def test_without_candidates_every_token_is_history(build: Build) -> None:
    sequence, none = build(history_of(), None), build(history_of(), candidates_of([0] * 4))
    assert sequence.num_targets_B.tolist() == [0, 0, 0, 0]
    assert torch.equal(sequence.x_TD, none.x_TD)
    assert torch.equal(sequence.places(), none.places())
    assert bool(sequence.content_T.any()) == (build is interleaved)


@both
def test_gradients_reach_every_embedding_once(build: Build) -> None:
    history, candidates = history_of(), candidates_of()
    leaves = [history.item_LD, history.action_LD, candidates.item_CD]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.autograd.backward(build(history, candidates).x_TD.sum())
    for name, leaf in zip(("item", "action", "candidate"), leaves, strict=True):
        assert leaf.grad is not None, name
        assert bool((leaf.grad == 1).all()), name


# Leaks. The stand-in for the encoder is dense, one row at a time, and sees what the attention's mask lets it see.


def visible(length: int, num_targets: int) -> Tensor:
    """bool[n, n]: a token sees itself and those at a lower place; targets share one place."""
    place = torch.arange(length).clamp(max=length - num_targets)
    return torch.eye(length, dtype=torch.bool) | (place[:, None] > place[None, :])


def encoded(sequence: TokenSequence) -> Tensor:
    """float64[T, D]: two layers of attention without softmax under the mask."""
    x = sequence.x_TD
    for _ in range(2):
        rows = []
        for row, num_targets in zip(rows_of(sequence, x), sequence.num_targets_B.tolist(), strict=True):
            weight = torch.nn.functional.silu(row @ row.T) * visible(len(row), num_targets)
            rows.append(row + torch.tanh(weight @ row))
        x = torch.cat(rows)
    return x


def changed(values: Tensor, *rows: int) -> Tensor:
    other = values.clone()
    other[list(rows)] += 3.0
    return other


def differs(sequence: TokenSequence, other: TokenSequence) -> Tensor:
    """bool[T]: where the encoder's output is another."""
    return (encoded(sequence) != encoded(other)).any(1)


def test_an_items_token_does_not_see_its_own_action_or_a_later_one_but_sees_those_before() -> None:
    history, candidates = history_of([4]), candidates_of([2])
    sequence = interleaved(history, candidates)
    for i in range(4):
        other = interleaved(replace(history, action_LD=changed(history.action_LD, i)), candidates)
        moved = differs(sequence, other)
        assert moved[sequence.item_positions_L].tolist() == [place > i for place in range(4)]
        assert moved[sequence.candidate_positions_C].tolist() == [True, True]


@both
def test_a_candidate_sees_the_last_action_of_its_own_history_only(build: Build) -> None:
    history, candidates = history_of(), candidates_of()
    sequence = build(history, candidates)
    moved = differs(sequence, build(replace(history, action_LD=changed(history.action_LD, 2)), candidates))
    assert moved[sequence.candidate_positions_C].tolist() == [True, True, False, False, False, False]


@both
def test_candidates_do_not_see_each_other_and_no_history_sees_them(build: Build) -> None:
    history, candidates = history_of(), candidates_of()
    sequence = build(history, candidates)
    moved = differs(sequence, build(history, replace(candidates, item_CD=changed(candidates.item_CD, 1, 3))))
    assert moved[sequence.candidate_positions_C].tolist() == [False, True, False, True, False, False]
    assert int(moved.sum()) == 2


@both
def test_candidates_score_alike_together_and_one_by_one(build: Build) -> None:
    history, candidates = history_of([4]), candidates_of([3])
    together = build(history, candidates)
    want = encoded(together)[together.candidate_positions_C]
    for c in range(3):
        single = replace(candidates, item_CD=candidates.item_CD[c : c + 1], offsets=torch.tensor([0, 1]))
        alone = build(history, single)
        torch.testing.assert_close(encoded(alone)[alone.candidate_positions_C][0], want[c])


def test_a_merged_token_knows_its_action_which_is_why_nothing_is_predicted_there() -> None:
    history = history_of([3])
    sequence = merged_with_dummy(history, None)
    moved = differs(sequence, merged_with_dummy(replace(history, action_LD=changed(history.action_LD, 2)), None))
    assert moved.tolist() == [False, False, True]
    assert not bool(sequence.content_T[2])


# Arguments


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"item_LD": torch.zeros(8)}, "item_LD must be a float matrix"),
        ({"item_LD": torch.zeros(8, WIDTH, dtype=torch.int64)}, "item_LD must be a float matrix"),
        ({"action_LD": torch.zeros(8, WIDTH)}, "action_LD must be torch.float64"),
        ({"timestamps_ms_L": torch.zeros(8)}, "timestamps_ms_L must be int64"),
        ({"offsets": torch.zeros(5)}, "offsets must be int64"),
    ],
)
def test_histories_that_do_not_fit_together_are_refused(part: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(history_of(), **part)


def test_candidates_that_do_not_fit_the_histories_are_refused() -> None:
    history, candidates = history_of(), candidates_of()
    with pytest.raises(ValueError, match="candidates are of 2 users and histories of 4"):
        interleaved(history, candidates_of([1, 1]))
    with pytest.raises(ValueError, match="item_CD is torch.float32"):
        interleaved(history, replace(candidates, item_CD=candidates.item_CD.float()))
    with pytest.raises(ValueError, match="request_times_ms_B must be int64"):
        replace(candidates, request_times_ms_B=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no_action_D must be float"):
        merged(history, candidates, NO_ACTION[:2])
