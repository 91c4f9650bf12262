"""Windows, oldest keys, unlimited queries, targets and contextual positions on rows of many blocks, on a CPU.

Rows cross the borders of the compiled form's blocks (48 queries), chunks (512 keys) and vectors, and of the tiles.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.hstu_attention import CAUSAL, AttentionMask, tiles
from kernels.hstu_attention.problem import AttentionProblem
from kernels.hstu_attention.tiles import plan
from tests.kernels import attention_case
from tests.kernels.attention_case import Case, make_case

LENGTHS = [620, 0, 49, 513]
MASKS = {
    "causal": CAUSAL,
    "newest see all": AttentionMask(max_attn_len=70, min_full_attn_len=31),
    "oldest are seen": AttentionMask(max_attn_len=70, num_oldest_keys=31),
    "one position beside oldest keys": AttentionMask(max_attn_len=1, num_oldest_keys=100),
    "no window beside oldest keys": AttentionMask(max_attn_len=0, num_oldest_keys=100),
    "no window, newest see all": AttentionMask(max_attn_len=0, min_full_attn_len=31),
    "no window, everything": AttentionMask(
        num_targets_B=torch.tensor([60, 0, 3, 130]),
        contextual_len=3,
        max_attn_len=0,
        min_full_attn_len=5,
        num_oldest_keys=17,
    ),
    "targets, no window": AttentionMask(num_targets_B=torch.tensor([101, 0, 7, 1]), max_attn_len=0, num_oldest_keys=9),
    "targets": AttentionMask(num_targets_B=torch.tensor([101, 0, 49, 1])),
    "targets behind a window": AttentionMask(num_targets_B=torch.tensor([101, 0, 7, 1]), max_attn_len=50),
    "contextual": AttentionMask(contextual_len=9, max_attn_len=50),
    "everything": AttentionMask(
        num_targets_B=torch.tensor([60, 0, 3, 130]),
        contextual_len=3,
        max_attn_len=90,
        min_full_attn_len=5,
        num_oldest_keys=17,
    ),
}


@pytest.fixture(autouse=True)
def _long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_case, "MAX_LEN", 640)


def make(mask: AttentionMask, *, dtype: torch.dtype = torch.float64, with_bias: bool = True) -> Case:
    return make_case(LENGTHS, mask=mask, dtype=dtype, num_heads=2, with_bias=with_bias, alpha=0.3)


def newest_only(whole: Case, num_queries: list[int]) -> Case:
    """The same rows with queries for their newest positions alone."""
    ends = whole.offsets[1:].tolist()
    index_M = torch.cat([torch.arange(end - num, end) for end, num in zip(ends, num_queries, strict=True)])
    return replace(
        whole,
        tensors={**whole.tensors, "q": whole.tensors["q"].detach()[index_M].requires_grad_()},
        query_offsets=torch.tensor([0, *num_queries]).cumsum(0),
        query_timestamps_s=whole.query_timestamps_s[index_M],
    )


def check(case: Case, kernel: str) -> None:
    want, got = case.run("reference"), case.run(kernel)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    wanted = case.gradients(want)
    for name, gradient in case.gradients(got).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-10, rtol=0, msg=f"gradient of {name}")


@pytest.mark.parametrize("kernel", ["native", "cpu"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", MASKS)
def test_output_and_gradients_equal_the_reference(name: str, kernel: str, *, with_bias: bool) -> None:
    check(make(MASKS[name], with_bias=with_bias), kernel)


@pytest.mark.parametrize("kernel", ["native", "cpu"])
@pytest.mark.parametrize("name", MASKS)
def test_queries_of_the_newest_positions_equal_the_reference(name: str, kernel: str) -> None:
    check(newest_only(make(MASKS[name]), [110, 0, 1, 200]), kernel)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", MASKS)
def test_a_cached_history_changes_no_bit_of_a_new_query(name: str, *, with_bias: bool) -> None:
    """In the compiled form, in single precision, wherever the new queries begin."""
    whole = make(MASKS[name], dtype=torch.float32, with_bias=with_bias)
    for num_queries in ([1, 0, 1, 1], [7, 0, 49, 100], [611, 0, 3, 512]):
        part = newest_only(whole, num_queries)
        ends = whole.offsets[1:].tolist()
        newest = torch.cat([torch.arange(end - num, end) for end, num in zip(ends, num_queries, strict=True)])
        assert torch.equal(part.run("native"), whole.run("native")[newest])


@pytest.mark.parametrize("name", ["newest see all", "oldest are seen", "contextual"])
@pytest.mark.parametrize("kernel", ["native", "cpu"])
def test_keys_outside_the_mask_of_a_block_are_left_out_of_its_products(name: str, kernel: str) -> None:
    """A NaN times a weight of 0 would be a NaN: none of these keys took part, forward or backward."""
    whole = make(MASKS[name], dtype=torch.float32)
    case = newest_only(whole, [1, 0, 0, 0])
    if name == "newest see all":  # the last one that does not
        case = replace(case, mask=AttentionMask(max_attn_len=70))
    unseen = slice(128, 500)
    poisoned = {**case.tensors}
    for which in ("k", "v"):
        poisoned[which] = case.tensors[which].detach().clone()
        poisoned[which][unseen] = torch.nan
        poisoned[which].requires_grad_()
    got = case.run(kernel, **poisoned)
    assert torch.equal(got, case.run(kernel))
    for name_of, gradient in replace(case, tensors=poisoned).gradients(got).items():
        assert bool(gradient.isfinite().all()), name_of


def num_scores(mask: AttentionMask, length: int) -> int:
    """Scores that the tiles of one row hold."""
    offsets = torch.tensor([0, length])
    problem = AttentionProblem(offsets=offsets, query_offsets=offsets, max_len=length, alpha=1.0, mask=mask, bias=None)
    return sum(tile.num_pairs for group in plan(problem, num_heads=1) for tile in group.tiles)


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(max_attn_len=256, min_full_attn_len=64),
        AttentionMask(max_attn_len=256, num_oldest_keys=64),
        AttentionMask(max_attn_len=256, contextual_len=4),
        AttentionMask(max_attn_len=0, num_oldest_keys=64),
    ],
    ids=["newest see all", "oldest are seen", "contextual", "no window"],
)
def test_the_tiles_of_a_window_grow_with_the_length_not_with_its_square(mask: AttentionMask) -> None:
    short, middle, long = (num_scores(mask, length) for length in (4096, 8192, 16_384))
    assert long - middle == 2 * (middle - short)
    assert long < num_scores(CAUSAL, 16_384) / 12


def test_the_tiles_of_many_targets_leave_out_other_targets() -> None:
    history, num_targets = 256, 2048
    scores = num_scores(AttentionMask(num_targets_B=torch.tensor([num_targets])), history + num_targets)
    own = num_targets * tiles.QUERIES_PER_TILE  # a block of targets against itself
    assert scores <= history * (history + tiles.QUERIES_PER_TILE) + num_targets * history + own


@pytest.mark.parametrize("name", MASKS)
def test_the_share_of_a_thread_is_measured_in_pairs_that_are_seen(name: str) -> None:
    lengths_B = torch.tensor(LENGTHS)
    queries_B = torch.tensor([110, 0, 1, 200])
    mask = MASKS[name]
    for num_queries_B in (lengths_B, queries_B):
        cached_B = lengths_B - num_queries_B
        for row, pairs in enumerate(mask.num_pairs(lengths_B, num_queries_B).tolist()):
            seen = _seen(mask, row, int(cached_B[row]))
            assert seen <= pairs <= 2.5 * seen + 60 * 60, f"row {row}"


def _seen(mask: AttentionMask, row: int, first_query: int) -> int:
    lengths: Tensor = torch.tensor(LENGTHS[row : row + 1])
    index = torch.arange(LENGTHS[row])[None]
    targets = mask.num_targets_in(torch.tensor(LENGTHS))[row : row + 1]
    return int(mask.visible(index[:, first_query:], index, lengths, targets).sum())
