"""The compiled form of HSTU attention: rows longer than its blocks, threads, and machines that cannot compile it.

Masks on rows longer than its chunks of keys: test_hstu_attention_semi_local.py.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import native_build
from kernels.errors import KernelUnavailableError
from kernels.hstu_attention import RelativeBias, hstu_attention, native, time_bucket
from kernels.native_build import native_library
from tests.kernels.attention_case import make_case

LENGTHS = [1, 47, 48, 49, 0, 96, 97, 5, 131, 200, 6]
"""Around the borders of blocks of 48 queries, groups of 6, and vectors of 4 to 16 numbers."""


def arguments(
    dtype: torch.dtype, *, num_heads: int, widths: tuple[int, int], times: str = "ascending"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Leaves by name, and what else ``run`` takes."""
    generator, total = torch.Generator().manual_seed(3), sum(LENGTHS)
    shapes = {"q": widths[0], "k": widths[0], "v": widths[1]}
    leaves = {n: torch.randn(total, num_heads, w, generator=generator, dtype=dtype) for n, w in shapes.items()}
    leaves |= {n: torch.randn(size, generator=generator, dtype=dtype) for n, size in (("position", 399), ("time", 129))}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    seconds = 1_400_000_000 + (10 ** (torch.rand(total, generator=generator) * 6)).long().cumsum(0)
    if times == "any order":
        seconds = seconds[torch.randperm(total, generator=generator)]
    given = {
        "offsets": torch.tensor([0, *LENGTHS]).cumsum(0),
        "timestamps_s_L": seconds,
        "query_timestamps_s_M": seconds + torch.randint(0, 10**5, (total,), generator=generator),
    }
    return leaves, given


def run(leaves: dict[str, Tensor], given: dict[str, Tensor], kernel: Any) -> dict[str, Tensor]:
    """The output, and the gradient of every leaf."""
    times = {name: tensor for name, tensor in given.items() if name != "offsets"}
    bias = RelativeBias(position_weight=leaves["position"], time_weight=leaves["time"], **times)
    q, k, v = (leaves[name] for name in "qkv")
    out = hstu_attention(q, k, v, given["offsets"], max_len=200, alpha=0.3, bias=bias, kernel=kernel)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream), strict=True)),
    }


@pytest.mark.parametrize("times", ["ascending", "any order"])
@pytest.mark.parametrize(("num_heads", "widths"), [(1, (50, 50)), (2, (32, 32)), (3, (5, 19))])
def test_rows_of_any_length_equal_the_reference_to_the_last_digits(
    num_heads: int, widths: tuple[int, int], times: str
) -> None:
    leaves, given = arguments(torch.float64, num_heads=num_heads, widths=widths, times=times)
    want, got = run(leaves, given, "reference"), run(leaves, given, "native")
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], atol=1e-11, rtol=1e-11, msg=name)


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["usual scores", "scores far beyond what an exponential holds"])
def test_single_precision_stays_close_to_double(scale: float) -> None:
    leaves, given = arguments(torch.float32, num_heads=2, widths=(32, 32))
    leaves = {n: (x.detach() * (scale if n in "qk" else 1)).requires_grad_() for n, x in leaves.items()}
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    got, want = run(leaves, given, "native"), run(exact, given, "reference")
    for name, tensor in got.items():
        error = (tensor.double() - want[name]).abs().max() / want[name].abs().max()
        assert float(error) < 2e-5, f"{name}: {float(error)}"


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_change_no_bit_of_a_row_and_each_run_is_the_same(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_PAIRS_PER_THREAD_MIN", 1)
    leaves, given = arguments(torch.float32, num_heads=2, widths=(32, 32))
    assert len(native._divided(given["offsets"].diff(), 2)) == 2
    first, again = run(leaves, given, "native"), run(leaves, given, "native")
    torch.set_num_threads(1)
    alone = run(leaves, given, "native")
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        if name in ("position", "time"):  # sums over rows, which each thread makes of its own
            torch.testing.assert_close(tensor, alone[name], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(tensor, alone[name]), name


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
@pytest.mark.parametrize("lengths", [LENGTHS, [], [0, 0], [3], [900, 1, 1, 1]])
def test_every_row_falls_to_exactly_one_thread(lengths: list[int], num_threads: int) -> None:
    parts = native._divided(torch.tensor(lengths, dtype=torch.int64), num_threads)
    assert 1 <= len(parts) <= num_threads
    assert torch.cat(parts).tolist() == list(range(len(lengths)))


def test_bucket_borders_are_those_of_the_formula() -> None:
    from_s = native.bucket_from_s(128).tolist()
    assert from_s[0] == 0
    assert all(shorter <= longer for shorter, longer in pairwise(from_s))
    for bucket, gap_s in enumerate(from_s[1:-1], start=1):
        assert int(time_bucket(torch.tensor(gap_s), 128)) >= bucket
        assert int(time_bucket(torch.tensor(gap_s - 1), 128)) < bucket


def test_it_is_the_form_that_plain_causal_rows_in_single_precision_take() -> None:
    case = make_case([5, 9, 30], dtype=torch.float32)
    assert torch.equal(case.run("auto"), case.run("native"))
    assert not torch.equal(case.run("auto"), case.run("cpu"))  # which rounds in another order


def test_heads_wider_than_it_takes_go_to_the_tiles_and_are_refused_by_name() -> None:
    wide = make_case([5, 3], dtype=torch.float32, num_heads=1, widths=(4, 1025))
    with pytest.raises(KernelUnavailableError, match="heads up to 1024 wide"):
        wide.run("native")
    assert torch.equal(wide.run("auto"), wide.run("cpu"))


SOURCE = Path(native.__file__).with_name("native.c")


@pytest.fixture
def fresh_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is compiled yet; returns where it would be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library.cache_clear()
    yield tmp_path / "headrace"
    native_library.cache_clear()


def test_without_a_compiler_attention_takes_its_other_form_and_the_log_says_so(
    fresh_machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(fresh_machine))
    case = make_case([5, 9, 30], dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(case.run("auto"), case.run("cpu"))
        case.run("auto")
    assert [record.message for record in caplog.records] == [
        "native.c is not compiled, its kernel takes its slower form: no C compiler (cc, gcc, clang) is installed"
    ]
    with pytest.raises(KernelUnavailableError, match="C compiler"):
        case.run("native")


def test_what_the_compiler_says_of_a_source_it_refuses_is_in_the_log(
    fresh_machine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "broken.c"
    source.write_text("int x = nothing_of_this_name;\n")
    with caplog.at_level(logging.WARNING):
        assert native_library(source, ()) is None
    assert "nothing_of_this_name" in caplog.text


def test_a_source_is_compiled_once_for_all_processes_and_anew_when_it_changes(
    fresh_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return ANSWER; }\n")
    library = native_library(source, ("ANSWER=42",))
    assert library is not None
    assert library.answer() == 42
    native_library.cache_clear()  # as another process would ask
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert native_library(source, ("ANSWER=42",)) is not None
    assert native_library(source, ("ANSWER=43",)) is None
    assert len(list(fresh_machine.iterdir())) == 1
    assert native_build._folder() == fresh_machine


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("num_heads", "widths"), [(1, (50, 50)), (2, (32, 32)), (3, (5, 19))])
def test_queries_of_cached_histories_get_what_the_reference_computes(
    *, num_heads: int, widths: tuple[int, int], with_bias: bool
) -> None:
    leaves, given = arguments(torch.float32, num_heads=num_heads, widths=widths, times="any order")
    num_queries = torch.tensor([1, 3, 48, 1, 0, 0, 97, 2, 50, 1, 6])
    offsets, query_offsets = given["offsets"], torch.cat([torch.zeros(1, dtype=torch.int64), num_queries.cumsum(0)])
    index_M = torch.cat([torch.arange(end - num, end) for end, num in zip(offsets[1:], num_queries, strict=True)])
    # Rows of a wider table, as keys and values are kept: not contiguous.
    kept = torch.cat([leaves["k"].flatten(1), leaves["v"].flatten(1)], 1).detach()
    k = kept[:, : num_heads * widths[0]].view(-1, num_heads, widths[0])
    v = kept[:, num_heads * widths[0] :].view(-1, num_heads, widths[1])
    bias = RelativeBias(
        position_weight=leaves["position"].detach(),
        time_weight=leaves["time"].detach(),
        timestamps_s_L=given["timestamps_s_L"],
        query_timestamps_s_M=given["query_timestamps_s_M"][index_M],
    )

    def attend(kernel: Any) -> Tensor:
        return hstu_attention(
            leaves["q"].detach()[index_M],
            k,
            v,
            offsets,
            max_len=200,
            alpha=0.3,
            bias=bias if with_bias else None,
            query_offsets=query_offsets,
            kernel=kernel,
        )

    torch.testing.assert_close(attend("native"), attend("reference"), rtol=0, atol=1e-5)
    torch.testing.assert_close(attend("native"), attend("cpu"), rtol=0, atol=1e-5)
