"""What each part of ULTRA-HSTU saves: one long history in training, and in answers with and without what is kept.

    python benchmarks/bench_long_histories.py [--length 2048] [--layers 4] [--results FILE]

Arms are plain HSTU with one part changed, and `ultra_hstu` as a whole. *train*: the encoder's forward and backward
pass. *cold*: everything computed for an answer. *warm*: one interaction came since the last one (mean over as many as
truncated layers stay put for, plus one, so that what they compute anew from time to time counts).

Medians of CPU time on one thread. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from model.batch import HistoryBatch
from model.config import ModelConfig
from model.recommender import Recommender
from model.transducers import Transducer
from model.user_state import KeptState, encode_newest

NUM_ITEMS = 20_000
VIEW, DEED = 1, 2
DEED_SHARE = 0.2


def arms(length: int, num_layers: int) -> dict[str, ModelConfig]:
    """By name, the first being what the others are compared with."""
    hstu = ModelConfig(max_len=length, num_layers=num_layers)
    local: dict[str, Any] = {"attention": "semi_local", "local_attn_len": length // 8, "global_attn_len": length // 32}
    truncated: dict[str, Any] = {"truncated_layers": num_layers // 2, "truncated_len": length // 4}
    mixture = (
        Transducer(name="views", actions=("view",), max_len=length // 2, mask=VIEW),
        Transducer(name="deeds", actions=("deed",), max_len=length // 4, mask=DEED),
    )
    ultra = replace(hstu, kind="ultra_hstu", **local, **truncated)
    return {
        "hstu, items": hstu,
        "interleaved": replace(hstu, tokens="interleaved"),
        "merged": replace(hstu, tokens="merged"),
        "without bias": replace(hstu, relative_bias=False),
        "semi-local, newest queries": replace(hstu, **local),
        "semi-local, oldest keys": replace(hstu, **local, global_attn="oldest_keys"),
        "truncated": replace(hstu, **truncated),
        "mixture": replace(hstu, transducers=mixture),
        "ultra_hstu": ultra,
        "ultra_hstu, oldest keys": replace(ultra, global_attn="oldest_keys"),
        "ultra_hstu, mixture": replace(ultra, transducers=mixture),
    }


def cpu_ms(work: Callable[[], object], *, at_least_s: float) -> float:
    """Median of repetitions, the first left out."""
    work()
    took: list[float] = []
    while sum(took) < at_least_s or len(took) < 3:
        started_s = time.process_time()
        work()
        took.append(time.process_time() - started_s)
    return median(took) * 1000


def history(length: int) -> HistoryBatch:
    """One user's, an interaction a minute."""
    rng = np.random.default_rng(0)
    times_ms = torch.arange(length) * 60_000
    return HistoryBatch(
        rows_L=torch.from_numpy(rng.integers(0, NUM_ITEMS, length)),
        timestamps_ms_L=times_ms,
        query_times_ms_L=times_ms + 60_000,
        offsets=torch.tensor([0, length]),
        actions_L=torch.from_numpy(np.where(rng.random(length) < DEED_SHARE, DEED, VIEW)),
        values_L=torch.full((length,), torch.nan),
    )


def measured(config: ModelConfig, *, at_least_s: float) -> dict[str, Any]:
    """Milliseconds, and bytes kept of the user."""
    recommender = Recommender(config)
    recommender.items.admit(np.arange(NUM_ITEMS))
    whole = history(config.max_len)
    active = recommender.items.activate(whole.rows_L)

    def train() -> None:
        recommender.zero_grad()
        u_LD = recommender.encode(whole, active, dropout=torch.Generator().manual_seed(0))
        u_LD[-1].sum().backward()  # type: ignore[no-untyped-call]

    def cold() -> KeptState:
        return encode_newest(recommender, whole, [None]).states[0]

    num_new = min(config.plan().truncated_hop + 1 if config.plan().num_truncated else 1, config.max_len // 2)
    parts = [whole.take(torch.arange(config.max_len - num_new + place)) for place in range(num_new + 1)]
    kept = [encode_newest(recommender, part, [None]).states[0] for part in parts[:-1]]

    def warm(place: int) -> float:
        return cpu_ms(
            lambda: encode_newest(recommender, parts[place + 1], [kept[place]]), at_least_s=at_least_s / num_new
        )

    with torch.no_grad():
        answer_ms = {"cold_ms": cpu_ms(cold, at_least_s=at_least_s), "warm_ms": mean(map(warm, range(num_new)))}
        num_bytes = cold().num_bytes
    return {"train_ms": cpu_ms(train, at_least_s=at_least_s), **answer_ms, "kept_bytes": num_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="interactions of the history")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement, at least")
    parser.add_argument("--results", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(f"{'':28}{'train ms':>10}{'cold ms':>10}{'warm ms':>10}{'kept KiB':>10}")
    for name, config in arms(options.length, options.layers).items():
        found = measured(config, at_least_s=options.seconds)
        ratios = {
            f"{one}_ratio": found[f"{one}_ms"] / rows[0][f"{one}_ms"] for one in ("train", "cold", "warm") if rows
        }
        rows.append({"arm": name} | found | {one: round(ratio, 3) for one, ratio in ratios.items()})
        times = "".join(f"{found[f'{one}_ms']:10.2f}" for one in ("train", "cold", "warm"))
        print(f"{name:28}{times}{found['kept_bytes'] / 1024:10.0f}", flush=True)
    for row in rows:
        row |= {one: round(row[one], 3) for one in ("train_ms", "cold_ms", "warm_ms")}
    result = {
        "benchmark": "long_histories",
        "length": options.length,
        "layers": options.layers,
        "rows": rows,
        **environment(),
    }
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
