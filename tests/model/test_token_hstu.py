"""Encoders that read actions: the formulas over tokens, nothing of what is predicted, and each use of their states."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.implementations import KernelName
from model.batch import HistoryBatch, Targets
from model.compute import Compute
from model.config import LossConfig, ModelConfig
from model.encoder import build_encoder
from model.learning import supervised_pass
from model.recommender import Recommender
from model.stochastic_length import StochasticLength, shortened
from model.token_hstu import Acts, TokenHSTU
from tests.model.test_hstu import LENGTHS, OFFSETS, RESEARCH, dense_layers, inputs, seeded
from tests.model.weights import far_from_start

ALL: dict[str, Any] = {
    "kind": "ultra_hstu",
    "local_attn_len": 2,
    "global_attn_len": 2,
    "truncated_layers": 1,
    "truncated_len": 5,
    "truncated_hop": 3,
}
FORMS: dict[str, dict[str, Any]] = {
    "merged": {"tokens": "merged"},
    "interleaved": {"tokens": "interleaved"},
    "values": {"tokens": "merged", "value_thresholds": (0.3, 0.7)},
    "surfaces": {"tokens": "merged", "surfaces": True},
    "surfaces, interleaved": {"tokens": "interleaved", "surfaces": True},
    "all": {**ALL, "surfaces": True},
    "all, interleaved, with bias": {**ALL, "tokens": "interleaved", "relative_bias": True},
}
every_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS.keys())


def acts() -> Acts:
    generator, num = seeded(5), sum(LENGTHS)
    actions_L = torch.randint(16, (num,), generator=generator)
    surfaces_L = torch.randint(4, (num,), generator=generator)
    return Acts(actions_L=actions_L | surfaces_L << 32, values_L=torch.rand(num, generator=generator))


def built(options: dict[str, Any]) -> TokenHSTU:
    encoder = far_from_start(build_encoder(replace(RESEARCH, **options), seeded()))
    assert isinstance(encoder, TokenHSTU)
    return encoder


def dense(encoder: TokenHSTU) -> Tensor:
    """u_LD of ``inputs`` and ``acts``, a row at a time."""
    item_LD, known_L, offsets, times_ms = inputs()
    done, rows = acts(), []
    for start, end in itertools.pairwise(offsets.tolist()):
        tokens: list[Tensor] = []
        times, asked = [], []
        for at in range(start, end):
            known = float(known_L[at])
            action_D = encoder.actions(done.actions_L[at : at + 1], done.values_L[at : at + 1])[0]
            happened, followed = (int(one[at]) // 1000 for one in times_ms)
            parts = [item_LD[at], action_D] if encoder.plan.tokens == "interleaved" else [item_LD[at] + action_D]
            for number, part in enumerate(parts):
                place = encoder.encoder.input.position_embedding[len(tokens)]
                tokens.append((part * math.sqrt(len(part)) + place) * known)
                times.append(happened)
                asked.append(followed if number == len(parts) - 1 else happened)
        if tokens:
            x_nD = dense_layers(encoder.encoder, torch.stack(tokens), times, asked)
            rows.append(x_nD[len(tokens) // (end - start) - 1 :: len(tokens) // (end - start)])
    x_LD = torch.cat(rows)
    return x_LD / x_LD.square().sum(1, keepdim=True).sqrt()


@every_form
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_states_and_gradients_are_those_of_the_formulas_over_tokens(
    options: dict[str, Any], kernel: KernelName
) -> None:
    encoder = built(options)
    got, want = encoder(*inputs(), acts=acts(), kernel=kernel), dense(encoder)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=seeded(3))
    parameters = dict(encoder.named_parameters())
    # What a candidate carries in the ranking head stands for nothing in a history.
    del parameters["actions.dummy_KE"]
    gradients = torch.autograd.grad(got, list(parameters.values()), upstream)
    expected = torch.autograd.grad(want, list(parameters.values()), upstream)
    for name, gradient, of_formula in zip(parameters, gradients, expected, strict=True):
        assert bool(of_formula.any()), f"{name} changes nothing"
        torch.testing.assert_close(gradient, of_formula, atol=1e-10, rtol=1e-9, msg=name)


@every_form
def test_the_action_on_an_item_is_not_seen_where_the_item_is_predicted(options: dict[str, Any]) -> None:
    encoder = built(options)
    item_LD, known_L, offsets, times_ms = inputs()
    known_L = torch.ones_like(known_L)
    before = encoder(item_LD, known_L, offsets, times_ms, acts=acts())
    index = 9  # of the last row, which starts at 5: position 8 predicts its item
    other = acts()
    other.actions_L[index] ^= 15 | 3 << 32
    other.values_L[index] = 1 - other.values_L[index]
    after = encoder(item_LD, known_L, offsets, times_ms, acts=other)
    changed = ((after - before).abs().amax(1) > 1e-9).nonzero().flatten().tolist()
    assert changed == list(range(index, int(OFFSETS[-1])))


@pytest.mark.parametrize("tokens", ["merged", "interleaved"])
def test_where_it_happened_is_seen_from_there_on_and_only_by_who_tells_surfaces_apart(tokens: Any) -> None:
    item_LD, known_L, offsets, times_ms = inputs()
    known_L = torch.ones_like(known_L)
    index, other = 9, acts()
    other.actions_L[index] ^= 3 << 32
    for surfaces in (True, False):
        encoder = built({"tokens": tokens, "surfaces": surfaces})
        before, after = (encoder(item_LD, known_L, offsets, times_ms, acts=one) for one in (acts(), other))
        changed = ((after - before).abs().amax(1) > 1e-9).nonzero().flatten().tolist()
        assert changed == (list(range(index, int(OFFSETS[-1]))) if surfaces else [])


def test_only_a_model_that_tells_surfaces_apart_is_another_model_for_it() -> None:
    plain = ModelConfig(kind="ultra_hstu")
    hashed = plain.hashed_fields()
    assert "surfaces" not in hashed
    assert replace(plain, surfaces=True).hashed_fields() == hashed | {"surfaces": True}


def recommender_of(options: dict[str, Any], **more: Any) -> Recommender:
    recommender = Recommender(replace(RESEARCH, **{**options, **more}))
    recommender.items.admit(np.arange(7))
    with torch.no_grad():
        recommender.items.weight[:7] = torch.randn(7, RESEARCH.embedding_dim, generator=seeded(4))
    return recommender


def batch_of(lengths: list[int]) -> HistoryBatch:
    num, generator = sum(lengths), seeded(6)
    times_ms = torch.arange(num) * 60_000
    return HistoryBatch(
        rows_L=torch.randint(7, (num,), generator=generator),
        timestamps_ms_L=times_ms,
        query_times_ms_L=times_ms + 60_000,
        offsets=torch.tensor([0, *itertools.accumulate(lengths)]),
        actions_L=torch.randint(16, (num,), generator=generator) | torch.arange(num) % 3 << 32,
        values_L=torch.rand(num, generator=generator),
    )


@every_form
@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_every_parameter_of_the_encoder_is_learned(options: dict[str, Any], loss: Any) -> None:
    recommender = recommender_of(options)
    targets = Targets(positions_P=torch.arange(12), rows_P=torch.arange(12) % 7)
    learned = supervised_pass(
        recommender, batch_of([9, 1, 2]), targets, LossConfig(kind=loss, num_negatives=3), generator=seeded()
    )
    learned.backward()
    for name, parameter in recommender.encoder.named_parameters():
        if not name.endswith("dummy_KE"):
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name


@every_form
def test_shortened_histories_keep_what_was_done(options: dict[str, Any]) -> None:
    batch, targets = batch_of([9] * 20), Targets(positions_P=torch.arange(8, 180, 9), rows_P=torch.zeros(20).long())
    short, moved = shortened(batch, targets, StochasticLength(alpha=1.2, max_len=9), generator=seeded())
    assert short.num_positions < batch.num_positions
    assert short.actions_L is not None
    assert short.values_L is not None
    assert batch.actions_L is not None
    assert batch.values_L is not None
    for mine, theirs in ((short.actions_L, batch.actions_L), (short.values_L, batch.values_L)):
        assert torch.equal(mine[moved.positions_P], theirs[targets.positions_P])
    u_LD = recommender_of(options).encode(short)
    assert u_LD.shape == (short.num_positions, RESEARCH.embedding_dim)
    # One history alone is encoded as among others.
    start, end = short.offsets[3:5].tolist()
    alone = replace(short.take(torch.arange(start, end)), offsets=torch.tensor([0, end - start]))
    torch.testing.assert_close(recommender_of(options).encode(alone), u_LD[start:end], atol=1e-6, rtol=0)


def test_an_encoder_that_reads_actions_refuses_a_batch_without() -> None:
    with pytest.raises(ValueError, match="the batch needs actions_L and values_L"):
        recommender_of({"tokens": "merged"}).encode(replace(batch_of([2]), values_L=None))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("actions_L", torch.zeros(3, dtype=torch.int32), "actions_L must be torch.int64"),
        ("values_L", torch.zeros(2), "values_L must be torch.float32"),
    ],
)
def test_actions_of_another_shape_or_type_are_refused(name: str, value: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(batch_of([3]), **{name: value})


@every_form
def test_in_bfloat16_states_are_nearly_the_same(options: dict[str, Any]) -> None:
    recommender, batch = recommender_of(options), batch_of([9, 4])
    expected = recommender.encode(batch)
    recommender.use(Compute(device=torch.device("cpu"), is_bfloat16=True))
    torch.testing.assert_close(recommender.encode(batch), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("told_by", ["action", "surface"])
def test_what_was_done_and_where_can_be_learned_from(told_by: str) -> None:
    """The next item follows from the last action, or surface, alone: only a model that reads it can predict."""

    def loss_after(tokens: Any, *, surfaces: bool = told_by == "surface") -> float:
        config = ModelConfig(
            embedding_dim=16, num_layers=1, num_heads=1, attention_dim=16, hidden_dim=16, max_len=8, tokens=tokens,
            surfaces=surfaces,
        )  # fmt: skip
        recommender, generator = Recommender(config), seeded(1)
        recommender.items.admit(np.arange(4))
        optimizer = torch.optim.Adam([*recommender.encoder.parameters(), recommender.log_scale], lr=0.02)
        losses = []
        for _ in range(120):
            kind = torch.randint(4, (64,), generator=generator)
            batch = HistoryBatch(
                rows_L=torch.randint(4, (64,), generator=generator),
                timestamps_ms_L=torch.zeros(64).long(),
                query_times_ms_L=torch.ones(64).long(),
                offsets=torch.arange(0, 65, 4),
                actions_L=1 << kind if told_by == "action" else 1 | kind << 32,
                values_L=torch.full((64,), torch.nan),
            )
            targets = Targets(positions_P=torch.arange(64), rows_P=kind)
            learned = supervised_pass(recommender, batch, targets, LossConfig(), generator=generator)
            optimizer.zero_grad()
            learned.backward()
            optimizer.step()
            losses.append(float(learned.loss.detach()))
        return sum(losses[-10:]) / 10

    blind = loss_after("items", surfaces=False)
    assert blind > 0.95 * math.log(4)
    assert max(loss_after(tokens) for tokens in ("merged", "interleaved")) < 0.5 * blind
