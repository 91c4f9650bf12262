"""The benchmark of ranking with and without users' vectors says what was measured, and of pairs the median."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.bench_upstream_serving import report
from benchmarks.serving_load import Asked


def turn(latency_ms: float, *, with_vector: int, errors: int = 0) -> dict[str, Any]:
    outcomes = {"ok": 10 - errors} | ({"429": errors} if errors else {})
    return {
        "requests": 10,
        "outcomes": outcomes,
        "latency_ms": [latency_ms] * 10,
        "with_vector": with_vector,
        "cpu_ms": latency_ms / 2,
    }


def test_ratios_are_of_all_requests_and_of_the_median_pair() -> None:
    told = report(
        {
            "with": [turn(11, with_vector=10), turn(11, with_vector=9, errors=1), turn(90, with_vector=10)],
            "without": [turn(10, with_vector=0), turn(10, with_vector=0), turn(30, with_vector=0)],
        }
    )
    assert told["arms"]["with"]["errors"] == 1
    assert (told["arms"]["with"]["with_vector"], told["arms"]["without"]["with_vector"]) == (29, 0)
    assert told["with_to_without"]["p99"] == 3.0
    assert told["with_to_without"]["p99_median_of_pairs"] == 1.1
    assert told["with_to_without"]["cpu"] == round((11 + 11 + 90) / (10 + 10 + 30), 3)


def test_candidates_are_drawn_without_repetition() -> None:
    user, path, body = Asked(users=5, candidates=40, items=40).request(random.Random(0))
    assert path == "/v1/rank"
    assert 0 <= user < 5
    assert sorted(map(int, body.decode().split("[")[1].rstrip("]}").split(","))) == list(range(40))
