"""SASRec, HSTU and HSTU-large on MovieLens-1M, leave-one-out, beside the rows the HSTU authors published.

    python benchmarks/table_ml1m.py [--data ../shared/data/ml-1m] [--arms sasrec hstu hstu-large] [--epochs 101]

Trains on whatever device is there and saves after every epoch under --state: stopped with Ctrl-C or killed, it goes on
from there. The data are the original files of MovieLens-1M (ratings.dat), or the reconstruction described in
docs/performance.md. Writes --results as JSON, and the table as Markdown beside it; the last line printed is the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.leave_one_out import Run, Sequences, TrainingPlan, epochs, read_ml1m
from kernels.host_memory import keep_freed_memory
from model.config import ModelConfig

LAYERS_AND_HEADS = {"sasrec": (2, 1), "hstu": (2, 1), "hstu-large": (8, 2)}
WIDTH = 50
"""Model width, and heads times width of a head, of all three."""
PADDED_LEN = 211
"""The window of 200 and 11 places that the research code reserves behind it: what attention sums are divided by."""
PUBLISHED: dict[str, dict[str, float]] = {
    "sasrec": {"hr@10": 0.2853, "ndcg@10": 0.1603, "hr@50": 0.5474, "hr@200": 0.7528, "ndcg@200": 0.2498},
    "hstu": {"hr@10": 0.3097, "ndcg@10": 0.1720, "hr@50": 0.5754, "hr@200": 0.7716, "ndcg@200": 0.2606},
    "hstu-large": {"hr@10": 0.3294, "ndcg@10": 0.1893, "hr@50": 0.5935, "hr@200": 0.7839, "ndcg@200": 0.2771},
}
"""README of the authors' research code (April 2024): the best epoch of each."""
METRICS = tuple(PUBLISHED["hstu"])


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = read_ml1m(options.data)
    plan = TrainingPlan(epochs=options.epochs, seed=options.seed)
    for arm in options.arms:
        _train(arm, data, plan, options.state / arm, device)
    found = {
        arm: _summary(arm, options.state / arm) for arm in PUBLISHED if (options.state / arm / "run.json").exists()
    }
    table = _table(found)
    print(table)
    result = {"benchmark": "ml-1m", "data": data.note, "plan": asdict(plan), "arms": found, **environment()}
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        options.results.with_suffix(".md").write_text(_page(table, data, found), encoding="utf-8")
    print(json.dumps({**result, "arms": {arm: {**row, "curve": len(row["curve"])} for arm, row in found.items()}}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The HSTU paper's table of MovieLens-1M, on this machine.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ml-1m"), help="folder of MovieLens-1M")
    parser.add_argument("--arms", nargs="*", choices=PUBLISHED, default=list(PUBLISHED), help="none: only tabulate")
    parser.add_argument("--epochs", type=int, default=101)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--state", type=Path, default=Path("var/ml-1m"), help="where runs are kept between calls")
    parser.add_argument("--results", type=Path, help="JSON file to write, with a Markdown page beside it")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"{options.data} is not a folder: unpack GroupLens's ml-1m.zip and pass it as --data")
    return options


def model_config(arm: str, *, seed: int) -> ModelConfig:
    """The published configuration of an arm."""
    num_layers, num_heads = LAYERS_AND_HEADS[arm]
    return ModelConfig(
        kind="sasrec" if arm == "sasrec" else "hstu",
        embedding_dim=WIDTH,
        num_layers=num_layers,
        num_heads=num_heads,
        attention_dim=WIDTH // num_heads,
        hidden_dim=WIDTH // num_heads,
        max_len=PADDED_LEN,
        input_dropout=0.2,
        linear_dropout=0.2,
        temperature=0.05,
        seed=seed,
    )


def _train(arm: str, data: Sequences, plan: TrainingPlan, folder: Path, device: torch.device) -> None:
    run = Run(config=model_config(arm, seed=plan.seed), plan=plan, data=data, device=device)
    progress = folder / "run.json"
    told: dict[str, Any] = {"commits": []}
    if progress.exists():
        told = json.loads(progress.read_text(encoding="utf-8"))
        run.load(folder, curve=told["curve"])
    here = environment()
    told |= {"commits": [*dict.fromkeys([*told["commits"], here["commit"]])], "threads": torch.get_num_threads()}
    told |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else here["machine"]["cpu"]}
    for row in epochs(run, folder):
        beside = progress.with_suffix(".new")
        beside.write_text(json.dumps({**told, "curve": run.curve}), encoding="utf-8")
        beside.replace(progress)
        shown = " ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "epoch")
        print(f"{arm} epoch {row['epoch']:.0f}: {shown}", flush=True)


def _summary(arm: str, folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    evaluated = [row for row in told["curve"] if "hr@10" in row]
    best = max(evaluated, key=lambda row: row["hr@10"])
    seconds = statistics.median(row["train_s"] for row in told["curve"])
    return {
        "epochs": len(told["curve"]),
        "best": best,
        "last": evaluated[-1],
        "best_of_published": {name: best[name] / PUBLISHED[arm][name] for name in METRICS},
        "train_s_per_epoch": seconds,
        "positions_per_s": statistics.median(row["positions"] for row in told["curve"]) / seconds,
        **told,
    }


def _table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"| model | epochs | {' | '.join(name.upper() for name in METRICS)} | s/epoch |",
        f"|---|---|{'---|' * len(METRICS)}---|",
    ]
    for arm, row in found.items():
        lines.append(f"| {arm}, published (best epoch) | 101 | {_cells(PUBLISHED[arm])} | |")
        lines.append(
            f"| {arm}, best epoch ({row['best']['epoch']:.0f}) | {row['epochs']} | {_cells(row['best'])} |"
            f" {row['train_s_per_epoch']:.1f} |"
        )
        lines.append(f"| {arm}, last epoch | {row['epochs']} | {_cells(row['last'])} | |")
        of_published = " | ".join(f"{row['best_of_published'][name] - 1:+.1%}" for name in METRICS)
        lines.append(f"| {arm}, best against published | | {of_published} | |")
    return "\n".join(lines)


def _cells(row: dict[str, float]) -> str:
    return " | ".join(f"{row[name]:.4f}" for name in METRICS)


def _page(table: str, data: Sequences, found: dict[str, dict[str, Any]]) -> str:
    devices = "; ".join(f"{arm}: {row['device']}, {row['threads']} threads" for arm, row in found.items())
    return (
        "# MovieLens-1M, leave-one-out\n\nThe last interaction of each of 6,040 users ranked among all"
        f" {data.num_items:,} items, those the model was shown filtered; made by `make table-ml1m`.\n\n{table}\n\n"
        f"Data: {data.note}. Devices: {devices}. The best epoch has the highest HR@10 on the test itself, as published;"
        " the last epoch is what one would get without looking. How this differs from the authors' code:"
        ' docs/performance.md, "MovieLens-1M".\n'
    )


if __name__ == "__main__":
    main()
