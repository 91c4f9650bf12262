"""The Triton kernels load the tiles that hold a visible pair and no other, counted in the interpreter.

Key blocks of the oldest keys and of the window, and query blocks of the window and of the unlimited newest queries, are
two separate ranges each; what lies between them is neither loaded nor computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernels.hstu_attention import (
    AttentionMask,
    RelativeBias,
    hstu_attention,
    triton_backward,
    triton_forward,
    triton_kernels,
    triton_tables,
)
from kernels.triton_support import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts calls that only the interpreter makes")

BLOCK = 16
"""Of queries and of keys when interpreted."""
LENGTH = 98
WIDTH_A, WIDTH_V = 5, 7
MASKS = {
    "window": AttentionMask(max_attn_len=20),
    "window, newest see all": AttentionMask(max_attn_len=20, min_full_attn_len=18),
    "window, oldest are seen": AttentionMask(max_attn_len=20, num_oldest_keys=18),
    "window, contextual": AttentionMask(max_attn_len=20, contextual_len=3),
    "window, targets": AttentionMask(max_attn_len=20, num_targets_B=torch.tensor([25])),
    "no window, newest see all": AttentionMask(max_attn_len=0, min_full_attn_len=18),
    "no window, oldest are seen": AttentionMask(max_attn_len=0, num_oldest_keys=18),
    "everything": AttentionMask(
        max_attn_len=20,
        min_full_attn_len=5,
        num_oldest_keys=18,
        contextual_len=3,
        num_targets_B=torch.tensor([25]),
    ),
}


def needed(mask: AttentionMask, first_query: int) -> int:
    """Tiles with a pair that is seen. Blocks of queries begin at the first one that has a query, a whole block in."""
    index = torch.arange(LENGTH)[None]
    targets = mask.num_targets_in(torch.tensor([LENGTH]))
    visible = mask.visible(index[:, first_query:], index, torch.tensor([LENGTH]), targets)[0]
    return sum(bool(tile.any()) for rows in torch.split(visible, BLOCK) for tile in torch.split(rows, BLOCK, dim=1))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Blocks of q and k (known by their width) that each module's kernels load, once there were calls."""
    counts: dict[str, int] = {}

    def counting(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def load_block(ptr: Any, index: Any, limit: Any, stride: Any, width: Any, block_width: Any) -> Any:
            counts[name] = counts.get(name, 0) + (getattr(width, "value", width) == WIDTH_A)
            return load(ptr, index, limit, stride, width, block_width)

        return load_block

    for name, module in (("forward", triton_forward), ("backward", triton_backward), ("tables", triton_tables)):
        monkeypatch.setattr(module, "load_block", counting(name, module.load_block))
    monkeypatch.setattr(triton_kernels, "_PROGRAMS_INTERPRETED", 1)
    return counts


@pytest.mark.parametrize(("name", "cached"), [*((name, 0) for name in MASKS), ("everything", 48)])
def test_no_tile_outside_the_mask_is_loaded(name: str, cached: int, loaded: dict[str, int]) -> None:
    mask, generator = MASKS[name], torch.Generator().manual_seed(0)
    num_queries = LENGTH - cached
    q = torch.randn(num_queries, 1, WIDTH_A, generator=generator, requires_grad=True)
    k, v = (torch.randn(LENGTH, 1, width, generator=generator, requires_grad=True) for width in (WIDTH_A, WIDTH_V))
    times = torch.randint(1, 10_000, (LENGTH,), generator=generator).cumsum(0)
    bias = RelativeBias(
        position_weight=torch.zeros(2 * LENGTH - 1, requires_grad=True),
        time_weight=torch.zeros(65, requires_grad=True),
        timestamps_s_L=times,
        query_timestamps_s_M=times[cached:],
    )
    out = hstu_attention(
        q,
        k,
        v,
        torch.tensor([0, LENGTH]),
        max_len=LENGTH,
        bias=bias,
        mask=mask,
        query_offsets=torch.tensor([0, num_queries]),
        kernel="triton",
    )
    query_blocks, key_blocks = -(-num_queries // BLOCK), -(-LENGTH // BLOCK)
    tiles = needed(mask, cached)
    assert loaded == {"forward": query_blocks + tiles}  # each program its own block, and one of keys for each tile
    torch.autograd.backward(out.sum())
    assert loaded["backward"] == query_blocks + tiles + key_blocks + tiles
    assert loaded["tables"] == 2 * tiles
