"""Load-balanced stochastic length: ranks cost alike, and every length is read whole as often as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

from model.config import LossConfig, ModelConfig
from model.load_balance import BalanceRule, LengthBalancer, LoadModel
from model.stochastic_length import sampled_lengths, short_len, whole_probability

MAX_LEN, ALPHA, NUM_HISTORIES = 1024, 1.7, 48
LENGTHS = torch.tensor([16, 64, 200, 400, 480, 600, 800, 1024])
"""The last four are above the paper's limit of 362 interactions, as is 400."""
MODEL = ModelConfig(embedding_dim=32, num_heads=2, attention_dim=16, hidden_dim=16, max_len=MAX_LEN)
LOAD = LoadModel.of(MODEL)


def rule(**changed: int) -> BalanceRule:
    return BalanceRule(
        alpha=ALPHA, max_len=MAX_LEN, load=LOAD, **{"warm_up_steps": 40, "exchange_every": 10, **changed}
    )


def histories(generator: torch.Generator) -> Tensor:
    """int64[B]: what a rank is given in one step; some steps have far more long histories than others."""
    favour = 2 * torch.rand((), generator=generator)
    weights = torch.exp(-0.05 * (1 + favour) * torch.arange(len(LENGTHS)))
    return LENGTHS[torch.multinomial(weights, NUM_HISTORIES, replacement=True, generator=generator)]


def run_rank(rank: int, num_ranks: int, num_steps: int, folder: str) -> None:
    """One process: what it drew, and what that costs, beside plain stochastic length on the same histories."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_ranks)
    balancer = LengthBalancer(rule(), all_reduce=dist.all_reduce)
    given, drawn = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(100 + rank)
    lengths_SB = torch.stack([histories(given) for _ in range(num_steps)])
    read_SB = torch.stack([balancer.sampled_lengths(one, generator=drawn) for one in lengths_SB])
    plain_SB = sampled_lengths(lengths_SB, alpha=ALPHA, max_len=MAX_LEN, generator=drawn)
    found = {"lengths": lengths_SB, "read": read_SB, "plain": plain_SB, "target": torch.tensor(balancer.target_load)}
    save_file(found, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def of_all_ranks(folder: Path, num_ranks: int) -> dict[str, Tensor]:
    """[ranks, steps, histories] of each, after the warm-up."""
    parts = [load_file(folder / f"{rank}.safetensors") for rank in range(num_ranks)]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def straggler(loads_RS: Tensor) -> float:
    """What the slowest rank of a step costs over what ranks cost on average, mean over steps."""
    return float((loads_RS.amax(0) / loads_RS.mean(0)).mean())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_cost_alike_and_each_length_is_read_whole_as_often_as_without(num_ranks: int, tmp_path: Path) -> None:
    spawn(run_rank, args=(num_ranks, 600, str(tmp_path)), nprocs=num_ranks)  # type: ignore[no-untyped-call]
    found = of_all_ranks(tmp_path, num_ranks)
    assert len(set(found["target"].tolist())) == 1, "every rank knows the same target"
    late = {name: found[name][:, 200:] for name in ("lengths", "read", "plain")}
    plain, balanced = (straggler(LOAD.loads(late[name]).sum(2)) for name in ("plain", "read"))
    assert balanced - 1 < (plain - 1) / 2, (plain, balanced)
    mean_load = float(LOAD.loads(late["plain"]).sum(2).mean())
    assert float(found["target"][0]) == pytest.approx(mean_load, rel=0.03), "the mean of all ranks"
    for length in LENGTHS.tolist():
        is_it = late["lengths"] == length
        trials, whole = int(is_it.sum()), float((late["read"][is_it] == length).double().mean())
        want = float(whole_probability(torch.tensor([length]), alpha=ALPHA, max_len=MAX_LEN))
        deviation = (want * (1 - want) / trials) ** 0.5
        assert abs(whole - want) <= 4 * deviation, (length, whole, want, deviation)


def test_a_rank_alone_has_steps_of_even_load() -> None:
    balancer, given, drawn = LengthBalancer(rule()), torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    lengths_SB = torch.stack([histories(given) for _ in range(500)])
    read_SB = torch.stack([balancer.sampled_lengths(one, generator=drawn) for one in lengths_SB])[100:]
    plain_SB = sampled_lengths(lengths_SB[100:], alpha=ALPHA, max_len=MAX_LEN, generator=drawn)
    spread = [float(LOAD.loads(one).sum(1).std() / LOAD.loads(one).sum(1).mean()) for one in (read_SB, plain_SB)]
    assert spread[0] < spread[1] / 2, spread


def test_short_histories_are_never_cut_and_long_ones_are_read_whole_or_at_the_papers_length() -> None:
    balancer, generator = LengthBalancer(rule(warm_up_steps=1)), torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths_B = histories(generator)
        read_B = balancer.sampled_lengths(lengths_B, generator=generator)
        assert bool(((read_B == lengths_B) | (read_B == short_len(alpha=ALPHA, max_len=MAX_LEN))).all())
        assert bool((read_B <= lengths_B).all())


def test_a_step_without_histories_or_without_long_ones_counts_and_changes_nothing() -> None:
    balancer, generator = LengthBalancer(rule(warm_up_steps=1, exchange_every=1)), torch.Generator().manual_seed(0)
    for lengths in ([], [0, 0], [5, 1, 362], [1024]):
        lengths_B = torch.tensor(lengths, dtype=torch.int64)
        read_B = balancer.sampled_lengths(lengths_B, generator=generator)
        assert read_B.shape == lengths_B.shape
        if max(lengths, default=0) < 1024:
            assert torch.equal(read_B, lengths_B)


def test_it_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    given, drawn = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    steps = [histories(given) for _ in range(120)]
    whole = LengthBalancer(rule())
    for one in steps[:70]:
        whole.sampled_lengths(one, generator=drawn)
    again, at = LengthBalancer(rule()), torch.Generator()
    again.load_state(whole.state())
    at.set_state(drawn.get_state())
    for one in steps[70:]:
        want = whole.sampled_lengths(one, generator=drawn)
        assert torch.equal(again.sampled_lengths(one, generator=at), want)


def test_a_load_grows_faster_than_the_length_the_more_so_the_dearer_a_pair_is() -> None:
    lengths = torch.tensor([100, 1000])
    tenfold = [
        float(loads[1] / loads[0])
        for loads in (LoadModel.of(MODEL, pair_cost=cost).loads(lengths) for cost in (1e-9, 0.001, 0.1))
    ]
    assert tenfold[0] == pytest.approx(10)
    assert tenfold[0] < tenfold[1] < tenfold[2] < 100


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stochastic_length_balance": True}, "stochastic_length_balance is set and stochastic_length_alpha is 0"),
        ({"stochastic_length_pair_cost": -1.0}, "stochastic_length_pair_cost is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LossConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [{"kind": "gru"}, {"transducers": [{"name": "all", "actions": ["click"]}]}])
def test_models_whose_cost_by_length_is_not_known_are_refused_by_name(model: dict[str, Any]) -> None:
    loss = LossConfig(stochastic_length_alpha=1.6, stochastic_length_balance=True)
    with pytest.raises(ValueError, match="stochastic_length_balance needs model.kind"):
        LengthBalancer.of(ModelConfig(**({"kind": "ultra_hstu"} | model)), loss)


def test_a_balancer_is_made_only_where_the_settings_ask_for_it() -> None:
    assert LengthBalancer.of(MODEL, LossConfig(stochastic_length_alpha=1.6)) is None
    loss = LossConfig(stochastic_length_alpha=1.6, stochastic_length_balance=True, stochastic_length_pair_cost=0.01)
    made = LengthBalancer.of(MODEL, loss)
    assert made is not None
    assert made.rule == BalanceRule(alpha=1.6, max_len=MAX_LEN, load=LoadModel.of(MODEL, pair_cost=0.01))
