"""A layer that computes again what it did not keep: the same gradients, less memory, attention run once."""

from __future__ import annotations

import gc
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kept_memory import kept_storages
from kernels.hstu_attention import CAUSAL, AttentionMask, hstu_attention
from kernels.implementations import KernelName
from model import hstu, recomputed_layer
from model.compute import Compute
from model.config import ModelConfig
from model.hstu import HSTU, HSTULayer
from model.recomputation import RepeatedPart

CONFIG = ModelConfig(embedding_dim=12, num_layers=2, num_heads=2, attention_dim=4, hidden_dim=5, max_len=9)
OPTIONS: dict[str, dict[str, Any]] = {
    "research": {},
    "production": {
        "affine_norms": True,
        "gate_only_activation": True,
        "scaled_scores": True,
        "concat_output": True,
        "relative_bias": False,
    },
    "dropout": {"linear_dropout": 0.3, "input_dropout": 0.2},
    "truncated": {"truncated_layers": 1, "truncated_len": 5, "truncated_hop": 3},
    "softmax": {"attention_activation": "softmax", "relative_bias": False, "hidden_dim": 4},
}
LENGTHS = [4, 0, 1, 9]


def encoder(*, recompute: bool, **options: Any) -> HSTU:
    built = HSTU(replace(CONFIG, recompute=recompute, **options), torch.Generator().manual_seed(0))
    with torch.no_grad():  # biases and scales, too, are to matter
        for number, parameter in enumerate(built.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.3)
    return built


def results(
    model: HSTU, *, lengths: list[int] = LENGTHS, kernel: KernelName = "auto", compute: Compute | None = None
) -> list[Tensor]:
    """States, and gradients of the items and of all parameters."""
    generator, num = torch.Generator().manual_seed(2), sum(lengths)
    item_LD = torch.randn(num, model.config.embedding_dim, generator=generator, requires_grad=True)
    times_ms = (10 ** (torch.rand(num, generator=generator) * 6 + 3)).long().cumsum(0)
    arguments = (torch.ones(num, dtype=torch.bool), torch.tensor([0, *lengths]).cumsum(0), (times_ms, times_ms + 5000))
    options: dict[str, Any] = {"dropout": torch.Generator().manual_seed(3), "kernel": kernel}
    if compute is None:
        out = model(item_LD, *arguments, **options)
    else:
        out = compute.call(model, item_LD, *arguments, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    leaves = [item_LD, *model.parameters()]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_states_and_gradients_are_the_same_bits(options: dict[str, Any]) -> None:
    want, got = results(encoder(recompute=False, **options)), results(encoder(recompute=True, **options))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("options", ["research", "production"])
def test_under_a_window_they_are_the_same_to_rounding(options: str) -> None:
    """The product to u, v, q and k is made in two halves there, which a library may sum in another order."""
    both: dict[str, Any] = {**OPTIONS[options], "attention": "semi_local", "local_attn_len": 2, "global_attn_len": 3}
    want, got = results(encoder(recompute=False, **both)), results(encoder(recompute=True, **both))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_they_are_in_bfloat16_where_weights_are_rounded_for_the_pass_alone() -> None:
    compute = Compute(device=torch.device("cpu"), is_bfloat16=True)
    want, got = (results(encoder(recompute=recompute), compute=compute) for recompute in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_histories_of_no_interactions_have_gradients_of_zero() -> None:
    got = results(encoder(recompute=True), lengths=[0, 0])
    assert got[0].shape == (0, CONFIG.embedding_dim)
    assert not any(bool(one.any()) for one in got[1:])


@pytest.mark.skipif(find_spec("triton") is None or torch.cuda.is_available(), reason="runs Triton's interpreter")
def test_the_fused_kernels_give_the_same_gradients() -> None:
    small: dict[str, Any] = {"num_layers": 1}
    want, got = (
        results(encoder(recompute=recompute, **small), lengths=[3, 2], kernel="triton") for recompute in (False, True)
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def kept_by_a_layer(width: int, num: int, mask: AttentionMask, *, recompute: bool) -> int:
    """Bytes that the forward pass of one row keeps besides weights; the backward pass runs, too."""
    config = replace(
        CONFIG, embedding_dim=width, num_heads=4, attention_dim=width // 4, hidden_dim=width // 4, max_len=num
    )
    layer = HSTULayer(replace(config, recompute=recompute), torch.Generator().manual_seed(0))
    x_LD, times = torch.randn(num, width, requires_grad=True), torch.arange(num)
    weights = {one.untyped_storage().data_ptr() for one in layer.parameters()}
    with kept_storages() as found:
        out = layer(x_LD, torch.tensor([0, num]), (times, times), mask=mask, dropout=None)
        kept = sum(size for address, size in found.items() if address not in weights)
    torch.autograd.backward(out.sum())
    assert x_LD.grad is not None
    return kept


@pytest.mark.parametrize("width", [256, 512])
def test_a_layer_keeps_a_sixth_of_its_activations_and_under_a_window_a_third(width: int) -> None:
    num, window = 300, AttentionMask(max_attn_len=40, min_full_attn_len=10)
    all_kept = kept_by_a_layer(width, num, CAUSAL, recompute=False)
    # Its input, what attention returned, and the times; under a window gate and values before their SiLU as well.
    for mask, most, share in ((CAUSAL, 2.1, 1 / 6), (window, 4.1, 1 / 3)):
        kept = kept_by_a_layer(width, num, mask, recompute=True)
        assert kept / (4 * num * width) < most
        assert kept < share * all_kept


def test_attention_is_run_once_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return hstu_attention(*arguments, **options)

    monkeypatch.setattr(hstu, "hstu_attention", counted)
    results(encoder(recompute=True))
    assert calls == CONFIG.num_layers


@pytest.mark.parametrize("mask", [CAUSAL, AttentionMask(max_attn_len=2)], ids=["full", "window"])
def test_one_graph_can_be_differentiated_twice_and_is_gone_when_it_is_let_go(mask: AttentionMask) -> None:
    layer = HSTULayer(replace(CONFIG, recompute=True), torch.Generator().manual_seed(0))
    x_LD, times = torch.randn(9, CONFIG.embedding_dim, requires_grad=True), torch.arange(9)
    gc.collect()
    gc.disable()  # what goes only with the collector of cycles would pile up from step to step
    try:
        out = layer(x_LD, torch.tensor([0, 9]), (times, times), mask=mask, dropout=None)
        (first,) = torch.autograd.grad(out.sum(), x_LD, retain_graph=True)
        (second,) = torch.autograd.grad(out.sum(), x_LD)
        assert torch.equal(first, second)
        assert not any(type(one) is RepeatedPart for one in gc.get_objects())
    finally:
        gc.enable()


def test_without_gradients_nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputed_layer, "RepeatedPart", None)
    layer = HSTULayer(replace(CONFIG, recompute=True), torch.Generator().manual_seed(0))
    x_LD, times = torch.randn(9, CONFIG.embedding_dim), torch.arange(9)
    with torch.no_grad():
        assert layer(x_LD, torch.tensor([0, 9]), (times, times), dropout=None).shape == x_LD.shape


def test_models_with_and_without_exchange_weights() -> None:
    assert replace(CONFIG, recompute=True).config_hash() == CONFIG.config_hash()
