"""The encoders equal the papers' formulas written out densely, a row, a head and an option at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.implementations import KernelName
from model.config import ModelConfig
from model.encoder import build_encoder
from model.encoder_plan import EncoderPlan
from model.hstu import HSTU, HSTULayer
from model.sasrec import SASRec, SASRecLayer
from tests.model.weights import far_from_start

RESEARCH = ModelConfig(
    embedding_dim=6, num_layers=2, num_heads=2, attention_dim=3, hidden_dim=4, max_len=9, num_time_buckets=20
)
PRODUCTION: dict[str, Any] = {
    "affine_norms": True,
    "gate_only_activation": True,
    "scaled_scores": True,
    "concat_output": True,
    "relative_bias": False,
    "time_embedding": True,
}
SOFTMAX: dict[str, Any] = {"attention_activation": "softmax", "relative_bias": False, "hidden_dim": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "research": {},
    **{name: {name: value} for name, value in PRODUCTION.items()},
    "production": PRODUCTION,
    "softmax": SOFTMAX,
    "softmax, production": {**PRODUCTION, **SOFTMAX},
    "sasrec": {"kind": "sasrec"},
    "newest queries see all": {"attention": "semi_local", "local_attn_len": 2, "global_attn_len": 3},
    "all see oldest keys": {
        "attention": "semi_local",
        "local_attn_len": 2,
        "global_attn_len": 3,
        "global_attn": "oldest_keys",
    },
    "local": {"attention": "semi_local", "local_attn_len": 3, "global_attn_len": 0},
    "no window, newest queries see all": {"attention": "semi_local", "local_attn_len": 0, "global_attn_len": 3},
    "no window, all see oldest keys": {
        "attention": "semi_local",
        "local_attn_len": 0,
        "global_attn_len": 3,
        "global_attn": "oldest_keys",
    },
    "truncated": {"truncated_layers": 1, "truncated_len": 5, "truncated_hop": 3},
    "truncated, local": {
        "truncated_layers": 1,
        "truncated_len": 6,
        "truncated_hop": 1,
        "attention": "semi_local",
        "local_attn_len": 1,
        "global_attn_len": 2,
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
LENGTHS = [4, 0, 1, 9]
OFFSETS = torch.tensor([0, *itertools.accumulate(LENGTHS)])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs() -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Item embeddings, which are known, offsets, times: gaps from seconds to weeks."""
    generator, num = seeded(2), sum(LENGTHS)
    item_LD = torch.randn(num, RESEARCH.embedding_dim, dtype=torch.float64, generator=generator)
    known_L = torch.rand(num, generator=generator) < 0.8
    gaps_ms = (torch.rand(num, dtype=torch.float64, generator=generator) * 21).exp().long() + 1
    times_ms = 1_700_000_000_000 + gaps_ms.cumsum(0)
    return item_LD, known_L, OFFSETS, (times_ms, times_ms + gaps_ms.roll(-1))


# The formulas


def dense_norm(x_nD: Tensor, affine: nn.Module | None = None) -> Tensor:
    centred_nD = x_nD - x_nD.mean(1, keepdim=True)
    normed_nD = centred_nD / (centred_nD.square().mean(1, keepdim=True) + 1e-6).sqrt()
    if affine is None:
        return normed_nD
    weight, bias = affine.parameters()
    return normed_nD * weight + bias


def dense_bias(layer: HSTULayer, time_s_n: list[int], query_s_n: list[int]) -> Tensor:
    """Of the distance in places, and of the gap between the prediction's time and the key's."""
    n, config = len(time_s_n), layer.config
    rows = []
    for i in range(n):
        buckets = [int(math.log(max(abs(query_s_n[i] - time_s_n[j]), 1)) / 0.301) for j in range(n)]
        rows.append(
            torch.stack(
                [
                    layer.position_weight[j - i + config.max_len - 1]
                    + layer.time_weight[min(buckets[j], config.num_time_buckets)]
                    for j in range(n)
                ]
            )
        )
    return torch.stack(rows)


def dense_visible(plan: EncoderPlan, n: int) -> Tensor:
    """Which of n places before it each of n places sees."""

    def sees(i: int, j: int) -> bool:
        if plan.local_len is None or i - j <= plan.local_len:
            return j <= i
        is_let_off = i >= n - plan.global_len if plan.global_attn == "newest_queries" else j < plan.global_len
        return j <= i and is_let_off

    return torch.tensor([[sees(i, j) for j in range(n)] for i in range(n)])


def dense_layer(layer: HSTULayer, x_nD: Tensor, time_s_n: list[int], query_s_n: list[int], plan: EncoderPlan) -> Tensor:
    config, n = layer.config, x_nD.shape[0]
    gate, attention = config.num_heads * config.hidden_dim, config.num_heads * config.attention_dim
    projected = dense_norm(x_nD, layer.input_norm) @ layer.uvqk
    u, v = projected[:, :gate], projected[:, gate : 2 * gate]
    q, k = projected[:, 2 * gate : 2 * gate + attention], projected[:, 2 * gate + attention :]
    u = functional.silu(u)
    if not config.gate_only_activation:
        v, q, k = functional.silu(v), functional.silu(q), functional.silu(k)
    causal_nn = dense_visible(plan, n)
    attended = []
    for h in range(config.num_heads):
        of_head = slice(h * config.attention_dim, (h + 1) * config.attention_dim)
        values = slice(h * config.hidden_dim, (h + 1) * config.hidden_dim)
        score_nn = q[:, of_head] @ k[:, of_head].T
        if config.attention_activation == "softmax":
            weight_nn = (score_nn / math.sqrt(config.attention_dim)).masked_fill(~causal_nn, -math.inf).softmax(1)
        else:
            score_nn = score_nn / (math.sqrt(config.attention_dim) if config.scaled_scores else 1)
            if layer.has_relative_bias:
                score_nn = score_nn + dense_bias(layer, time_s_n, query_s_n)
            weight_nn = functional.silu(score_nn) / config.max_len * causal_nn
        attended.append(weight_nn @ v[:, values])
    o = torch.cat(attended, dim=1)
    y = u * dense_norm(o, layer.output_norm)
    if config.concat_output:
        y = torch.cat([u, o, y], dim=1)
    return x_nD + y @ layer.output_weight + layer.output_bias


def dense_sasrec_layer(layer: SASRecLayer, x_nD: Tensor) -> Tensor:
    n, width = x_nD.shape
    weights = dict(layer.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}_weight"] + weights[f"{name}_bias"]

    normed_nD = dense_norm(x_nD, layer.attention_norm)
    q, k, v = linear("query", normed_nD), linear("key", x_nD), linear("value", x_nD)
    head = width // layer.config.num_heads
    attended = []
    for start in range(0, width, head):
        part = slice(start, start + head)
        score_nn = q[:, part] @ k[:, part].T / math.sqrt(head)
        attended.append(score_nn.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(1) @ v[:, part])
    h_nD = dense_norm(normed_nD + linear("output", torch.cat(attended, dim=1)), layer.ffn_norm)
    return h_nD + linear("ffn_out", linear("ffn_in", h_nD).clamp(min=0))


def dense_layers(encoder: HSTU, x_nD: Tensor, time_s_n: list[int], query_s_n: list[int]) -> Tensor:
    """The layers over one row, the truncated ones over its newest only."""
    plan = encoder.plan
    for number, layer in enumerate(encoder.layers):
        assert isinstance(layer, HSTULayer)
        start = 0
        if number >= len(encoder.layers) - plan.num_truncated:
            while len(x_nD) - start > plan.truncated_len:
                start += plan.truncated_hop
        newest_nD = dense_layer(layer, x_nD[start:], time_s_n[start:], query_s_n[start:], plan)
        x_nD = torch.cat([x_nD[:start], newest_nD])
    return x_nD


def dense_encoder(encoder: HSTU | SASRec) -> Tensor:
    """u_LD of ``inputs``."""
    item_LD, known_L, offsets, times_ms = inputs()
    rows = []
    for start, end in itertools.pairwise(offsets.tolist()):
        if start == end:
            continue
        time_s_n, query_s_n = ((t[start:end] // 1000).tolist() for t in times_ms)
        x_nD = item_LD[start:end] * math.sqrt(item_LD.shape[1]) + encoder.input.position_embedding[: end - start]
        if encoder.input.age_embedding is not None:
            ages = [min(int(math.sqrt(max(query_s_n[-1] - t, 0) / 60)), 2047) for t in time_s_n]
            x_nD = x_nD + encoder.input.age_embedding[ages]
        x_nD = x_nD * known_L[start:end, None]
        if isinstance(encoder, HSTU):
            x_nD = dense_layers(encoder, x_nD, time_s_n, query_s_n)
        else:
            for layer in encoder.layers:
                assert isinstance(layer, SASRecLayer)
                x_nD = dense_sasrec_layer(layer, x_nD)
        rows.append(x_nD / x_nD.square().sum(1, keepdim=True).sqrt())
    return torch.cat(rows)


# Encoders


@every_option
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_states_and_gradients_are_those_of_the_formulas(options: dict[str, Any], kernel: KernelName) -> None:
    encoder = far_from_start(build_encoder(replace(RESEARCH, **options), seeded()))
    assert isinstance(encoder, HSTU | SASRec)
    got = encoder(*inputs(), kernel=kernel)
    want = dense_encoder(encoder)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=seeded(3))
    parameters = dict(encoder.named_parameters())
    gradients = torch.autograd.grad(got, list(parameters.values()), upstream)
    expected = torch.autograd.grad(want, list(parameters.values()), upstream)
    for name, gradient, of_formula in zip(parameters, gradients, expected, strict=True):
        # What is added to every key alike does not change a softmax.
        assert bool(of_formula.any()) or name.endswith("key_bias"), f"{name} changes nothing"
        torch.testing.assert_close(gradient, of_formula, atol=1e-10, rtol=1e-9, msg=name)


def test_affine_norms_start_as_identity() -> None:
    research, affine = (HSTU(replace(RESEARCH, affine_norms=on), seeded()).double() for on in (False, True))
    assert torch.equal(affine(*inputs()), research(*inputs()))
    added = {name for name, _ in affine.named_parameters()} - {name for name, _ in research.named_parameters()}
    assert len(added) == RESEARCH.num_layers * 4


def test_a_layer_without_relative_bias_has_no_tables_and_one_without_ages_no_embedding() -> None:
    def names(**options: Any) -> set[str]:
        return {name.rsplit(".", 1)[-1] for name, _ in HSTU(replace(RESEARCH, **options), seeded()).named_parameters()}

    assert names() - names(relative_bias=False) == {"position_weight", "time_weight"}
    assert names(time_embedding=True) - names() == {"age_embedding"}


@every_option
def test_weights_are_a_function_of_configuration_and_seed(options: dict[str, Any]) -> None:
    config = replace(RESEARCH, **options)
    first, again, other = (dict(build_encoder(config, seeded(seed)).named_parameters()) for seed in (1, 1, 2))
    assert first.keys() == again.keys() == other.keys()
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
    assert any(not torch.equal(parameter, other[name]) for name, parameter in first.items())


@pytest.mark.parametrize("options", [{}, {"kind": "sasrec"}, SOFTMAX], ids=str)
def test_a_state_sees_nothing_that_comes_after_it(options: dict[str, Any]) -> None:
    encoder = far_from_start(build_encoder(replace(RESEARCH, **options), seeded()))
    item_LD, known_L, offsets, times_ms = inputs()
    known_L = torch.ones_like(known_L)
    before = encoder(item_LD, known_L, offsets, times_ms)
    index = 8  # of the last row, which starts at 5
    item_LD = torch.where((torch.arange(14) == index)[:, None], -item_LD, item_LD)
    after = encoder(item_LD, known_L, offsets, times_ms)
    changed = ((after - before).abs().amax(1) > 1e-9).nonzero().flatten().tolist()
    assert changed == list(range(index, 14))


@pytest.mark.parametrize("options", [{}, {"kind": "sasrec"}, {"time_embedding": True}, SOFTMAX], ids=str)
def test_no_histories_have_no_states(options: dict[str, Any]) -> None:
    encoder = build_encoder(replace(RESEARCH, **options), seeded())
    none = torch.empty(0, dtype=torch.int64)
    got = encoder(torch.empty(0, 6), none.bool(), torch.zeros(3, dtype=torch.int64), (none, none))
    assert got.shape == (0, 6)


@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
def test_a_row_longer_than_max_len_is_refused(kind: Any) -> None:
    encoder = build_encoder(replace(RESEARCH, max_len=8, kind=kind), seeded()).double()
    with pytest.raises(ValueError, match="longest row has 9 places; max_len is 8"):
        encoder(*inputs())


# Settings


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"kind": "transformer"}, "kind is 'transformer'"),
        ({"attention_activation": "relu"}, "attention_activation is 'relu'"),
        ({"attention_activation": "softmax"}, "softmax, which has no relative bias"),
        ({"attention_activation": "softmax", "relative_bias": False}, "hidden_dim is 4; it must equal attention_dim"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_time_buckets": 0}, "num_time_buckets is 0"),
        ({"tokens": "pairs"}, "tokens is 'pairs'"),
        ({"attention": "sparse"}, "attention is 'sparse'"),
        ({"global_attn": "middle"}, "global_attn is 'middle'"),
        ({"local_attn_len": -1}, "local_attn_len is -1; it must be between 0"),
        (
            {"attention": "semi_local", "local_attn_len": 0, "global_attn_len": 0},
            "local_attn_len and global_attn_len are both 0",
        ),
        ({"global_attn_len": -1}, "global_attn_len is -1"),
        ({"truncated_layers": 2}, "truncated_layers is 2; it must be between 0 and 1"),
        ({"truncated_layers": 1, "truncated_len": 10}, "truncated_len is 10; it must be between 1 and 9"),
        ({"truncated_len": 4, "truncated_hop": 5}, "truncated_hop is 5; it must be between 1 and 4"),
        ({"value_thresholds": (5.0,)}, "value_thresholds is set, but tokens are items alone"),
        ({"surfaces": True}, "surfaces is on, but tokens are items alone"),
        ({"tokens": "merged", "value_thresholds": (5.0, 4.0)}, r"value_thresholds is \[5.0, 4.0\]; it must ascend"),
        ({"kind": "sasrec", "tokens": "merged"}, "tokens, attention and truncated_layers are for hstu and ultra_hstu"),
        ({"kind": "gru", "attention": "semi_local"}, "tokens, attention and truncated_layers are for hstu"),
        ({"kind": "ultra_hstu", "local_attn_len": 2, **SOFTMAX}, "attention is semi_local, which softmax attention"),
    ],
)
def test_settings_that_make_no_encoder_are_refused(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(RESEARCH, **setting)


def test_sasrec_refuses_heads_that_do_not_divide_its_width() -> None:
    with pytest.raises(ValueError, match=r"embedding_dim is 6; sasrec needs a multiple of num_heads \(4\)"):
        build_encoder(replace(RESEARCH, kind="sasrec", num_heads=4), seeded())


def test_a_model_that_uses_nothing_of_ultra_hstu_takes_weights_from_before_there_was_any() -> None:
    # Fields added later are in the hash only where they are used.
    assert ModelConfig().config_hash() == "1dffa606162cea8d3122ff795acd69921e5f07ced3cdd446635c6a3fa2aea449"


def test_what_a_kind_leaves_open_is_decided_by_it_and_each_part_can_be_switched_alone() -> None:
    plain = ModelConfig(max_len=2048, num_layers=4)
    ultra = replace(plain, kind="ultra_hstu")
    hstu_plan, ultra_plan = plain.plan(), ultra.plan()
    assert hstu_plan == replace(
        ultra_plan, tokens="items", has_relative_bias=True, local_len=None, global_len=0, num_truncated=0
    )
    assert (ultra_plan.tokens, ultra_plan.local_len, ultra_plan.global_len) == ("merged", 256, 64)
    assert (ultra_plan.num_truncated, ultra_plan.truncated_len, ultra_plan.truncated_hop) == (2, 512, 64)
    off: dict[str, Any] = {"tokens": "items", "attention": "full", "truncated_layers": 0, "relative_bias": True}
    assert replace(ultra, **off).plan() == hstu_plan
    assert len({replace(ultra, **{name: value}).plan() for name, value in off.items()}) == len(off)


def test_limits_that_no_history_reaches_are_none() -> None:
    short = ModelConfig(kind="ultra_hstu", max_len=64, num_layers=4).plan()
    assert (short.local_len, short.num_truncated) == (None, 0)


def test_encoders_that_differ_in_any_option_do_not_exchange_weights() -> None:
    hashes = [replace(RESEARCH, **options).config_hash() for options in OPTIONS.values()]
    assert len(set(hashes)) == len(hashes)
    assert set(RESEARCH.as_dict()) == {field.name for field in fields(ModelConfig)}
