"""Reserved memory is zeros that cost nothing until they are touched."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from model.reserved_memory import reserved_zeros

GIB = 1 << 30


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("in_huge_pages", [False, True])
def test_a_large_table_takes_memory_only_where_it_is_written(in_huge_pages: bool) -> None:
    before = resident_bytes()
    table = reserved_zeros(1 << 20, 64, dtype=torch.float32, in_huge_pages=in_huge_pages)
    assert resident_bytes() - before < 16 << 20
    table[:1000] = 1
    assert resident_bytes() - before < 16 << 20
    assert table[999].sum() == 64
    assert table[1000].sum() == table[-1].sum() == 0


def test_more_than_the_system_has_is_refused_with_the_setting_to_change() -> None:
    with pytest.raises(MemoryError, match=r"lower model\.max_items"):
        reserved_zeros(1 << 40, 1 << 10)
