"""What the model thread computes for a recommendation: user states with and without what is kept, and the search.

    python benchmarks/bench_recommend.py [--only states|search] [--items 10000 100000 1000000] [--results FILE]

*states*: the encoder over one history of 512 interactions (HSTU, default model): everything computed, a repeated
request, and one with new interactions. *search*: the 10 best of the whole live catalogue without 200 items seen, in
chunks (kernels/top_k), against scoring the catalogue whole and sorting it (yardstick), for one state and for 32.

Medians of CPU time on one thread, so other processes count little. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.environment import environment
from kernels.jagged import JaggedTensor
from kernels.top_k import top_k
from model.batch import HistoryBatch
from model.config import ModelConfig
from model.recommender import Recommender
from model.user_state import encode_newest

HISTORY_LEN = 512
WIDTH = 64
NUM_SEEN = 200
K = 10


def cpu_ms(work: Callable[[], object], *, at_least_s: float = 1.0) -> float:
    """Median of repetitions, the first left out."""
    work()
    took: list[float] = []
    while sum(took) < at_least_s or len(took) < 5:
        started_s = time.process_time()
        work()
        took.append(time.process_time() - started_s)
    return round(median(took) * 1000, 3)


def states() -> list[dict[str, Any]]:
    """Milliseconds an answer spends in the encoder."""
    recommender = Recommender(ModelConfig(max_len=HISTORY_LEN)).eval()
    recommender.items.admit(np.arange(20_000))
    rng = np.random.default_rng(0)
    found = []
    for num_users in (1, 8):
        rows = [rng.integers(0, 20_000, HISTORY_LEN) for _ in range(num_users)]
        whole = _batch(rows, HISTORY_LEN)
        everything = cpu_ms(lambda batch=whole: recommender.encode(batch)[batch.last_positions()])  # type: ignore[misc]
        found.append({"users": num_users, "arm": "everything computed", "ms": everything, "times_faster": 1.0})
        nothing = [None] * num_users
        ms = cpu_ms(lambda batch=whole, kept=nothing: encode_newest(recommender, batch, kept))  # type: ignore[misc]
        found.append({"users": num_users, "arm": "first", "ms": ms, "times_faster": round(everything / ms, 1)})
        for num_new in (0, 1, 10):
            # The newest position of the earlier request was not settled, so it is computed again too.
            earlier = encode_newest(recommender, _batch(rows, HISTORY_LEN - num_new), nothing).states
            ms = cpu_ms(lambda batch=whole, kept=earlier: encode_newest(recommender, batch, kept))  # type: ignore[misc]
            arm = f"{num_new} new interactions" if num_new else "repeated"
            found.append({"users": num_users, "arm": arm, "ms": ms, "times_faster": round(everything / ms, 1)})
    return found


def _batch(rows: list[np.ndarray[Any, np.dtype[np.int64]]], length: int) -> HistoryBatch:
    """Each user's first `length` interactions, a minute apart."""
    times_n = torch.arange(length) * 60_000
    return HistoryBatch(
        rows_L=torch.from_numpy(np.concatenate([own[:length] for own in rows])),
        timestamps_ms_L=times_n.repeat(len(rows)),
        query_times_ms_L=(times_n + 60_000).repeat(len(rows)),
        offsets=torch.arange(len(rows) + 1) * length,
    )


def search(sizes: list[int]) -> list[dict[str, Any]]:
    """Milliseconds of finding the best items for a micro-batch of states."""
    found = []
    for num_items in sizes:
        generator = torch.Generator().manual_seed(0)
        item_VD = functional.normalize(torch.randn(num_items, WIDTH, generator=generator), dim=1)
        offset_V = torch.randn(num_items, generator=generator)
        for num_users in (1, 32):
            u_UD = functional.normalize(torch.randn(num_users, WIDTH, generator=generator), dim=1)
            seen = [torch.randint(0, num_items, (NUM_SEEN,), generator=generator) for _ in range(num_users)]
            excluded = JaggedTensor.of(seen)

            def whole(
                u_UD: Tensor = u_UD, item_VD: Tensor = item_VD, offset_V: Tensor = offset_V, seen: list[Tensor] = seen
            ) -> None:
                scores_UV = torch.addmm(offset_V, u_UD * 5.0, item_VD.T)
                for scores_V, rows in zip(scores_UV, seen, strict=True):
                    scores_V[rows] = -torch.inf
                    scores_V.sort(descending=True)

            def chunked(
                u_UD: Tensor = u_UD,
                item_VD: Tensor = item_VD,
                offset_V: Tensor = offset_V,
                excluded: JaggedTensor = excluded,
            ) -> None:
                top_k(u_UD, item_VD, K, scale=5.0, offset_V=offset_V, excluded=excluded)

            ms, yardstick_ms = cpu_ms(chunked), cpu_ms(whole)
            found.append(
                {
                    "items": num_items,
                    "users": num_users,
                    "ms": ms,
                    "ms_a_user": round(ms / num_users, 3),
                    "yardstick_ms": yardstick_ms,
                }
            )
    return found


def _table(rows: list[dict[str, Any]]) -> None:
    print(" ".join(f"{name:>20}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{value!s:>20}" for value in row.values()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="what the model thread computes for a recommendation")
    parser.add_argument("--only", choices=("states", "search"), help="one part")
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="catalogue sizes")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = {}
    with torch.inference_mode():
        if args.only != "search":
            measured["states"] = states()
            _table(measured["states"])
        if args.only != "states":
            measured["search"] = search(args.items)
            _table(measured["search"])
    result = {"benchmark": "recommend", **environment(), "history_len": HISTORY_LEN, **measured}
    if args.results:
        args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
