"""The benchmark of semi-local attention: what it concludes from its rows, and a rehearsal at tiny lengths."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from benchmarks import bench_semi_local
from benchmarks.bench_semi_local import PASSES, exponents, speedups


def row(arm: str, length: int, seconds: float) -> dict[str, Any]:
    return {"kernel": "native", "bias": True, "arm": arm, "length": length, "cpu_s": dict.fromkeys(PASSES, seconds)}


def test_exponents_and_speedups_are_read_off_the_rows() -> None:
    rows = [row("causal", n, 1e-6 * n**2) for n in (1000, 2000)]
    rows += [row("oldest are seen", n, 1e-4 * n) for n in (1000, 2000)]
    for name in PASSES:
        assert exponents(rows)[f"native, bias, causal, {name}"] == 2.0
        assert exponents(rows)[f"native, bias, oldest are seen, {name}"] == 1.0
        assert speedups(rows)[f"native, bias, oldest are seen, {name}"] == 20.0


def test_every_arm_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def here(case: dict[str, Any], _options: Any) -> dict[str, Any]:
        return case | bench_semi_local._measure(case, 1)

    monkeypatch.setattr(bench_semi_local, "_row", here)
    monkeypatch.setattr(sys, "argv", ["bench_semi_local", "--lengths", "40", "80", "--steps", "1"])
    bench_semi_local.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["rows"]) == 2 * 2 * 2 * 3
    assert len(result["exponents"]) == 2 * 2 * 3 * 2
    assert len(result["speedup"]) == 2 * 2 * 2 * 2
    assert all(one["cpu_s"][name] > 0 for one in result["rows"] for name in PASSES)
