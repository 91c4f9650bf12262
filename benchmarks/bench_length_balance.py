"""How evenly ranks that train together are loaded: plain against load-balanced stochastic length.

    python benchmarks/bench_length_balance.py [--ranks 2 4 8] [--steps 600] [--timed-steps 20]

Every rank is a process of its own in a gloo group of torch.distributed. Each step it is given --histories histories
whose lengths are log-normal (median 650, a fifth above 1,750, at most --max-len), and draws what is read of them twice:
by plain stochastic length and balanced. *straggler* is the load of the slowest rank of a step over the mean of all
ranks, averaged over steps: what everybody waits for. Loads are floating-point operations in closed form
(model.flops); for the first number of ranks, `cpu` is the same ratio of the CPU time that forward and backward pass of
the encoder took. *read whole* compares, by length, how often long histories were read whole with the rule's chance, in
standard deviations of the binomial: the largest of 16 classes of length.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.environment import environment
from model.config import ModelConfig
from model.hstu import HSTU
from model.load_balance import BalanceRule, LengthBalancer, LoadModel
from model.stochastic_length import sampled_lengths, short_len, whole_probability

ARMS = ("plain", "balanced")
WARM_UP = 100
NUM_CLASSES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What every rank does."""

    num_ranks: int
    num_steps: int
    num_timed: int
    num_histories: int
    alpha: float
    model: ModelConfig

    def rule(self) -> BalanceRule:
        load = LoadModel.of(self.model)
        return BalanceRule(alpha=self.alpha, max_len=self.model.max_len, load=load, warm_up_steps=WARM_UP)


def run_rank(rank: int, plan: Plan, folder: str) -> None:
    """Draw lengths of all steps, time the last ones, leave both in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=plan.num_ranks)
    balancer = LengthBalancer(plan.rule(), all_reduce=dist.all_reduce)
    given, drawn = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(1_000 + rank)
    lengths_SB = torch.empty(plan.num_steps, plan.num_histories, dtype=torch.float64).normal_(6.5, 1.2, generator=given)
    lengths_SB = lengths_SB.exp_().ceil_().clamp_(max=plan.model.max_len).long()
    began = time.process_time()
    balanced = torch.stack([balancer.sampled_lengths(one, generator=drawn) for one in lengths_SB])
    draw_s = (time.process_time() - began) / plan.num_steps
    plain = sampled_lengths(lengths_SB, alpha=plan.alpha, max_len=plan.model.max_len, generator=drawn)
    encoder = HSTU(plan.model, torch.Generator().manual_seed(0))
    cpu_s = [[pass_s(encoder, read_B) for read_B in (one, other)] for one, other in _last(plain, balanced, plan)]
    found = {"lengths": lengths_SB, "plain": plain, "balanced": balanced}
    times = {"cpu_s": torch.tensor(cpu_s, dtype=torch.float64), "draw_s": torch.tensor([draw_s])}
    save_file(found | times, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def _last(plain: Tensor, balanced: Tensor, plan: Plan) -> list[tuple[Tensor, Tensor]]:
    first = plan.num_steps - plan.num_timed
    return list(zip(plain[first:], balanced[first:], strict=True))


def pass_s(encoder: HSTU, read_B: Tensor) -> float:
    """CPU seconds of a forward and backward pass over histories of so many interactions."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), read_B.cumsum(0)])
    num = int(offsets[-1])
    item_LD = torch.ones(num, encoder.config.embedding_dim, requires_grad=True)
    times = torch.arange(num)
    began = time.process_time()
    states = encoder.hidden_states(item_LD, None, offsets, (times, times))
    states.sum().backward()  # type: ignore[no-untyped-call]
    return time.process_time() - began


def measure(plan: Plan) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, args=(plan, folder), nprocs=plan.num_ranks)  # type: ignore[no-untyped-call]
        parts = [load_file(Path(folder) / f"{rank}.safetensors") for rank in range(plan.num_ranks)]
    of_ranks = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    late = {name: of_ranks[name][:, 2 * WARM_UP :] for name in ("lengths", *ARMS)}
    load = LoadModel.of(plan.model)
    found: dict[str, Any] = {"ranks": plan.num_ranks, "draw_ms": round(float(of_ranks["draw_s"].mean()) * 1000, 3)}
    for number, arm in enumerate(ARMS):
        loads_RS = load.loads(late[arm]).sum(2)
        found[arm] = {
            "straggler": straggler(loads_RS),
            "load_deviation": float(loads_RS.std() / loads_RS.mean()),
            "mean_load": float(loads_RS.mean()),
            "read_whole_deviations_max": deviations(late["lengths"], late[arm], plan),
        }
        if plan.num_timed:
            found[arm]["cpu_straggler"] = straggler(of_ranks["cpu_s"][:, :, number])
    found["throughput_gain"] = found["plain"]["straggler"] / found["balanced"]["straggler"] - 1
    return found


def straggler(cost_RS: Tensor) -> float:
    return float((cost_RS.amax(0) / cost_RS.mean(0)).mean())


def deviations(lengths: Tensor, read: Tensor, plan: Plan) -> float:
    """Largest deviation of the share read whole from the rule's, in standard deviations, over classes of length."""
    short = short_len(alpha=plan.alpha, max_len=plan.model.max_len)
    is_long = lengths > short
    lengths, read = lengths[is_long], read[is_long]
    chance = whole_probability(lengths, alpha=plan.alpha, max_len=plan.model.max_len)
    bounds = short * (plan.model.max_len / short) ** (torch.arange(1, NUM_CLASSES) / NUM_CLASSES)
    classes, largest = torch.bucketize(lengths.double(), bounds.double()), 0.0
    for number in range(NUM_CLASSES):
        of_class = classes == number
        spread = float((chance[of_class] * (1 - chance[of_class])).sum()) ** 0.5
        if spread:
            surplus = float((read[of_class] == lengths[of_class]).sum() - chance[of_class].sum())
            largest = max(largest, abs(surplus) / spread)
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description="Straggler ratios of plain and load-balanced stochastic length.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 2, 8])
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--timed-steps", type=int, default=20, help="steps computed, of the first number of ranks")
    parser.add_argument("--histories", type=int, default=64, help="of one rank's step")
    parser.add_argument("--max-len", type=int, default=4_096)
    parser.add_argument("--alpha", type=float, default=1.7)
    parser.add_argument("--results", type=Path, help="JSON file to write")
    options = parser.parse_args()
    model = ModelConfig(
        embedding_dim=32, num_heads=1, attention_dim=32, hidden_dim=32, max_len=options.max_len, relative_bias=False
    )
    measured = []
    print(f"{'ranks':>5} {'arm':<9}{'straggler':>10}{'cpu':>7}{'load sd':>9}{'read whole':>12}{'ms a draw':>11}")
    for place, num_ranks in enumerate(options.ranks):
        plan = Plan(
            num_ranks=num_ranks,
            num_steps=options.steps,
            num_timed=options.timed_steps if place == 0 else 0,
            num_histories=options.histories,
            alpha=options.alpha,
            model=model,
        )
        found = measure(plan)
        measured.append(found)
        for arm in ARMS:
            row = found[arm]
            cpu = f"{row['cpu_straggler']:.3f}" if "cpu_straggler" in row else ""
            print(
                f"{num_ranks:>5} {arm:<9}{row['straggler']:>10.3f}{cpu:>7}{row['load_deviation']:>9.3f}"
                f"{row['read_whole_deviations_max']:>11.1f}s{found['draw_ms'] if arm == 'balanced' else '':>11}",
                flush=True,
            )
    shape = {"histories": options.histories, "max_len": options.max_len, "alpha": options.alpha, "steps": options.steps}
    result = {"benchmark": "length_balance", **environment(), **shape, "measured": measured}
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
