"""Ranks equal a literal count, ties count against the target, and misses are told apart."""

from __future__ import annotations

import torch

from model.ranking import MISS_RANK, SeenRows, ranks, seen_before


def test_ranks_equal_counting_one_item_at_a_time() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(0, 6, (40, 15), generator=generator).float()
    targets = torch.randint(-1, 15, (40,), generator=generator)
    lengths = torch.randint(0, 7, (40,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    seen = SeenRows(rows_S=torch.randint(0, 15, (int(offsets[-1]),), generator=generator), offsets=offsets)
    pairs = seen.distinct()
    for num_known in (15, 9, 0):
        got = ranks(logits, targets, seen, num_known=num_known).tolist()
        in_parts = [
            ranks(logits[part], targets[part], pairs.of_targets(part, device=logits.device), num_known=num_known)
            for part in (slice(0, 17), slice(17, 40))
        ]
        assert torch.cat(in_parts).tolist() == got
        for p in range(40):
            hidden = set(seen.rows_S[offsets[p] : offsets[p + 1]].tolist())
            target = int(targets[p])
            row = logits[p]
            if target < 0 or target >= num_known or target in hidden:
                assert got[p] == MISS_RANK
                continue
            before = [v for v in range(num_known) if v != target and v not in hidden and row[v] >= row[target]]
            assert got[p] == 1 + len(before)


def test_a_constant_score_ranks_last() -> None:
    assert ranks(torch.zeros(2, 5), torch.tensor([0, 4])).tolist() == [5, 5]
    assert ranks(torch.zeros(2, 5, dtype=torch.bfloat16), torch.tensor([0, 4])).tolist() == [5, 5]


def test_scores_that_are_not_numbers_never_help_the_target() -> None:
    nan = float("nan")
    assert ranks(torch.tensor([[1.0, nan, 0.0], [nan, 1.0, 0.0]]), torch.tensor([0, 0])).tolist() == [2, 3]


def test_seen_before_is_the_history_up_to_the_predicting_position() -> None:
    rows = torch.tensor([4, 5, 6, 7, -1, 8])
    seen = seen_before(rows, torch.tensor([0, 3, 3, 6]), torch.tensor([0, 2, 3, 5]))
    assert seen.offsets.tolist() == [0, 1, 4, 5, 7]
    assert seen.rows_S.tolist() == [4, 4, 5, 6, 7, 7, 8]


def test_no_targets_give_no_ranks() -> None:
    none = torch.empty(0, dtype=torch.int64)
    seen = seen_before(torch.tensor([1, 2]), torch.tensor([0, 2]), none)
    assert ranks(torch.zeros(0, 3), none, seen).tolist() == []
