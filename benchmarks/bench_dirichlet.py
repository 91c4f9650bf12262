"""Pointwise against softmax attention on a stream whose categories get richer as they are chosen.

    python benchmarks/bench_dirichlet.py [--records 24000] [--items 20000]

The HSTU paper's synthetic check (papers 2402.17152, table 2 and appendix C): a one-pass stream of sequences from a
Dirichlet process over a vocabulary that grows, evaluated on its last tenth. Published: HR@10 .0617 with softmax, .0893
pointwise, both without relative bias (+45 %), and .0442 for a Transformer. The sizes of its data set are not published
in full: only the ratio of the arms can be compared. Every arm learns from the same records in the same order.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backtest.dirichlet import DirichletConfig, dirichlet_records
from benchmarks.environment import environment
from benchmarks.leave_one_out import NextItemModel, Windows
from kernels.host_memory import keep_freed_memory
from kernels.softmax_loss import sampled_softmax_loss
from model.config import ModelConfig
from model.ranking import ranks

Int64s = NDArray[np.int64]
CUTOFFS = (10, 50)
TEST_SHARE = 0.1
PUBLISHED = {
    "transformer": {"hr@10": 0.0442, "hr@50": 0.2025},
    "hstu-softmax": {"hr@10": 0.0617, "hr@50": 0.2496},
    "hstu-pointwise": {"hr@10": 0.0893, "hr@50": 0.3170},
}


def arm_config(arm: str, *, width: int, layers: int, record_len: int, seed: int) -> ModelConfig:
    return ModelConfig(
        kind="sasrec" if arm == "transformer" else "hstu",
        attention_activation="softmax" if arm == "hstu-softmax" else "silu",
        relative_bias=False,
        embedding_dim=width,
        num_layers=layers,
        num_heads=1,
        attention_dim=width,
        hidden_dim=width,
        max_len=record_len,
        temperature=0.05,
        seed=seed,
    )


def learn_once(model: NextItemModel, items: Int64s, stream: DirichletConfig, options: argparse.Namespace) -> float:
    """One pass over the training records in order; seconds it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(stream.seed)
    started = time.perf_counter()
    for first in range(0, len(items), options.batch):
        batch = next_items(items[first : first + options.batch])
        known = int(items[: first + options.batch].max()) + 1 if first == 0 else known_items(stream, first)
        negative_rows = torch.randint(known, (batch.rows_L.shape[0], options.negatives), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        found = sampled_softmax_loss(
            model(batch), model.unit_items(), batch.target_rows_L, negative_rows, scale=1 / model.config.temperature
        )
        found.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return time.perf_counter() - started


def known_items(stream: DirichletConfig, record: int) -> int:
    """Items that exist at a record: rows below it."""
    share = stream.first_share + (1 - stream.first_share) * record / stream.num_records
    return max(int(stream.num_items // stream.num_categories * share), 1) * stream.num_categories


def next_items(items: Int64s) -> Windows:
    num_records, length = items.shape
    rows = torch.from_numpy(items)
    times_L = torch.arange(length - 1).repeat(num_records)
    return Windows(
        rows_L=rows[:, :-1].flatten(),
        times_s_L=times_L,
        query_times_s_L=times_L + 1,
        target_rows_L=rows[:, 1:].flatten(),
        offsets=torch.arange(num_records + 1) * (length - 1),
    )


@torch.no_grad()
def test(model: NextItemModel, items: Int64s) -> dict[str, float]:
    """HR over the whole vocabulary at the second half of every record's positions."""
    unit_VD, found = model.unit_items(), []
    for first in range(0, len(items), 32):
        batch = next_items(items[first : first + 32])
        late_P = (batch.times_s_L >= items.shape[1] // 2).nonzero()[:, 0]
        found.append(ranks(model(batch)[late_P] @ unit_VD.T, batch.target_rows_L[late_P]))
    rank_P: Tensor = torch.cat(found)
    return {f"hr@{k}": float((rank_P <= k).double().mean()) for k in CUTOFFS}


def ideal(stream: DirichletConfig, items: Int64s) -> dict[str, float]:
    """HR of knowing each record's counts so far and nothing of its prior: items of its most frequent categories."""
    per_category, hits = stream.num_items // stream.num_categories, dict.fromkeys(CUTOFFS, 0.0)
    categories = items % stream.num_categories
    total = 0
    for record in categories[:500]:
        for place in range(items.shape[1] // 2 + 1, items.shape[1]):
            counts = np.bincount(record[:place], minlength=stream.num_categories)
            rank = int((counts > counts[record[place]]).sum())
            total += 1
            for k in CUTOFFS:
                hits[k] += min(max(k - rank * per_category, 0), per_category) / per_category
    return {f"hr@{k}": hits[k] / total for k in CUTOFFS}


def main() -> None:
    parser = argparse.ArgumentParser(description="Pointwise against softmax attention on a Dirichlet-process stream.")
    parser.add_argument("--records", type=int, default=24_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=50)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128, help="records of a step")
    parser.add_argument("--negatives", type=int, default=128)
    parser.add_argument("--arms", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    stream = DirichletConfig(num_records=options.records, num_items=options.items, seed=options.seed)
    items = dirichlet_records(stream).items_RT
    split = int(len(items) * (1 - TEST_SHARE))
    found: dict[str, dict[str, Any]] = {}
    print(f"{'arm':16s} {'HR@10':>8s} {'HR@50':>8s} {'published HR@10':>16s} {'s':>7s}")
    for arm in options.arms:
        config = arm_config(
            arm, width=options.width, layers=options.layers, record_len=stream.record_len, seed=stream.seed
        )
        model = NextItemModel(config, stream.num_items)
        seconds = learn_once(model, items[:split], stream, options)
        found[arm] = {**test(model, items[split:]), "train_s": seconds}
        row = found[arm]
        print(
            f"{arm:16s} {row['hr@10']:8.4f} {row['hr@50']:8.4f} {PUBLISHED[arm]['hr@10']:16.4f} {seconds:7.0f}",
            flush=True,
        )
    made = {**asdict(stream), "test_share": TEST_SHARE}
    result: dict[str, Any] = {"benchmark": "dirichlet", "stream": made, "arms": found, "published": PUBLISHED}
    result["counts_alone"] = ideal(stream, items[split:])
    if {"hstu-softmax", "hstu-pointwise"} <= found.keys():
        result["pointwise_over_softmax"] = found["hstu-pointwise"]["hr@10"] / found["hstu-softmax"]["hr@10"]
        print(f"pointwise over softmax: {result['pointwise_over_softmax']:.3f} (published 1.447)")
    print(f"ranking by category counts alone: {result['counts_alone']}")
    result |= environment()
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
