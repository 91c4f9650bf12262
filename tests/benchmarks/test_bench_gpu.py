"""The GPU benchmark, rehearsed: every arm of every section runs, on the CPU and with tiny shapes."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from benchmarks import bench_gpu, environment
from benchmarks.gpu_attention import growth, local_speedup, stochastic_rows
from benchmarks.gpu_harness import FULL, TINY, Arm, Bench, Case
from benchmarks.growth import visible_pairs
from kernels.hstu_attention import CAUSAL, AttentionMask

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU runs the benchmark itself")


def cpu_bench(sizes: Any = TINY) -> Bench:
    return Bench(device=torch.device("cpu"), sizes=sizes, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("section", bench_gpu.SECTIONS)
def test_every_arm_of_a_section_runs(
    section: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures: list[str] = []
    monkeypatch.setattr(Bench, "_failed", lambda _self, _case, arm, error: failures.append(f"{arm.name}: {error}"))
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--dry-run", "--only", section])
    bench_gpu.main()
    assert failures == []
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["dry_run"] is True
    brief = summary["sections"][section]
    assert brief["failed"] == []
    if section == "top-k" and find_spec("kernels.top_k") is None:
        assert (brief["rows"], brief["skipped"]) == (0, 1)
    else:
        assert brief["rows"] > 0
        assert brief["skipped"] == 0


def test_a_failing_arm_is_a_row_and_the_others_go_on() -> None:
    def broken() -> Any:
        raise RuntimeError("no such thing\nbelow")

    arms = [Arm(name="a", make=broken), Arm(name="b", make=lambda: {"forward": lambda: None})]
    bench = cpu_bench()
    bench.run(Case(shape={"N": 1}, arms=arms, work={"forward": 1.0}))
    assert [row["arm"] for row in bench.rows] == ["a", "b"]
    assert bench.rows[0]["error"] == "RuntimeError: no such thing"
    assert bench.rows[1]["pass"] == "forward"


def test_what_does_not_fit_into_the_time_is_told() -> None:
    bench = cpu_bench()
    slow = Arm(name="slow", patience_s=1e12, make=dict)
    bench.deadline = 1e12 - 1
    bench.run(Case(shape={"N": 1}, arms=[slow], work={}))
    bench.deadline = -math.inf
    bench.run(Case(shape={"N": 2}, arms=[slow], work={}))
    assert bench.rows == []
    assert bench.skipped == ["N=1, slow: out of time", "N=2: out of time"]


@pytest.mark.parametrize(("alpha", "length", "sparsity"), [(1.6, 8192, 0.844), (1.8, 2048, 0.453), (1.8, 8192, 0.664)])
def test_stochastic_rows_are_as_sparse_as_the_papers(alpha: float, length: int, sparsity: float) -> None:
    rows = stochastic_rows(cpu_bench(FULL), length, 16 * FULL.num_positions, alpha)
    assert rows.sparsity == pytest.approx(sparsity, abs=0.03)
    assert max(rows.lengths) <= length
    assert int(rows.offsets[-1]) == rows.num_positions


@pytest.mark.parametrize(
    "mask", [CAUSAL, AttentionMask(max_attn_len=3), AttentionMask(max_attn_len=3, min_full_attn_len=2)]
)
def test_visible_pairs_are_those_of_the_mask(mask: AttentionMask) -> None:
    index = torch.arange(9)[None]
    visible = mask.visible(index, index, torch.tensor([9]), torch.tensor([0]))
    assert visible_pairs(mask, 9) == int(visible.sum())


def test_growth_is_the_exponent_of_the_length() -> None:
    rows = [
        {"arm": "a", "pass": "forward", "shape": {"N": length}, "ms": 3e-9 * length**2} for length in (2048, 4096, 8192)
    ]
    assert growth(rows) == {"a, forward": 2.0}


def test_semi_local_arms_are_compared_with_the_triangle_at_its_longest_rows() -> None:
    rows = [
        {"arm": arm, "pass": "forward", "shape": {"N": length}, "ms": ms}
        for arm, length, ms in [
            ("causal", 8, 4.0),
            ("causal", 16, 16.0),
            ("causal, bias", 16, 32.0),
            ("oldest are seen", 8, 2.0),
            ("oldest are seen", 16, 4.0),
            ("oldest are seen, bias", 16, 4.0),
            ("oldest are seen", 32, 8.0),
        ]
    ]
    assert local_speedup(rows) == {
        "causal, forward": 1.0,
        "causal, bias, forward": 1.0,
        "oldest are seen, forward": 4.0,
        "oldest are seen, bias, forward": 8.0,
    }


def test_targets_are_read_off_the_rows_they_are_for() -> None:
    shape = {"rows": "dense", "N": 8192, "A": 128}
    rows = [
        {"arm": arm, "pass": name, "shape": shape, "ms": ms, "share_of_peak": share}
        for arm, name, ms, share in [
            ("headrace", "forward", 1.0, 0.6),
            ("headrace, bias", "forward", 1.25, 0.48),
            ("headrace", "backward", 3.0, 0.5),
        ]
    ]
    assert bench_gpu.targets(rows) == {
        "forward_share": {"target": 0.6, "reached": 0.6},
        "forward_bias_by_no_bias": {"target": 0.7, "reached": 0.8},
        "backward_share": {"target": 0.45, "reached": 0.5},
    }


def test_the_environment_leaves_out_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("numpy", "no-such-package"))
    assert set(environment.environment()["versions"]) == {"python", "sqlite", "numpy"}
