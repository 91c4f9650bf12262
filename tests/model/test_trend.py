"""Decayed popularity equals its definition, at any time and in any order."""

from __future__ import annotations

import numpy as np
import torch

from model.trend import add_interactions, decay_rate_per_ms, log_popularity

HALF_LIFE_S = 7 * 86_400.0
NOW_MS = 1_700_000_000_000


def test_popularity_is_the_sum_of_halved_interactions() -> None:
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 20, size=500)
    times = NOW_MS - rng.integers(0, 200 * 86_400_000, size=500)
    rate = decay_rate_per_ms(HALF_LIFE_S)
    log_weight = torch.full((22,), -torch.inf, dtype=torch.float64)
    for part in np.array_split(rng.permutation(500), 13):
        touched = add_interactions(log_weight, rows[part], times[part], rate_per_ms=rate)
        assert touched.tolist() == sorted(set(rows[part].tolist()))
    want = np.zeros(22)
    np.add.at(want, rows, 0.5 ** ((NOW_MS - times) / 1000 / HALF_LIFE_S))
    got = log_popularity(log_weight, as_of_ms=NOW_MS, rate_per_ms=rate, floor=0.1)
    torch.testing.assert_close(got.double(), torch.from_numpy(np.log(want + 0.1)), atol=1e-6, rtol=1e-6)
    assert got[20:].tolist() == [torch.log(torch.tensor(0.1)).item()] * 2


def test_nothing_to_add_touches_nothing() -> None:
    log_weight = torch.zeros(3, dtype=torch.float64)
    none = np.empty(0, dtype=np.int64)
    assert add_interactions(log_weight, none, none, rate_per_ms=1e-9).tolist() == []
    assert log_weight.tolist() == [0, 0, 0]
