"""The benchmark of users' vectors measures what it says: they are stored, found again, and absent without upstream."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.bench_upstream import answering, computing, filled, model_of, serve_version, training
from model.upstream_config import UpstreamConfig

SMALL = UpstreamConfig(width=8, embedding_dim=8, num_layers=1, num_heads=1, latent_dim=4, head_dim=4, ffn_dim=8)


def test_vectors_are_computed_stored_and_read(tmp_path: Path) -> None:
    store = filled(tmp_path, num_users=70, length=6)
    serve_version(store)
    found = computing(store, model_of(SMALL), 70, seconds=30)
    assert found["users"] == 70
    assert found["read_share"] + found["network_share"] + found["write_share"] > 0.99
    assert store.user_states.newest("bench", np.arange(70), width=8).is_there.all()
    assert training(store, 70, 8, seconds=0.05)["cpu_ms"] > 0
    told = answering(store, 70, 8, seconds=0.2)
    assert told["memory"]["p50_us"] < told["store"]["p50_us"]
    store.close()
