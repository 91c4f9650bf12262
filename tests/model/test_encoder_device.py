"""Encoders compute on the device of their parameters what they compute on the CPU, in training too."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.implementations import KernelName
from model.config import ModelConfig
from model.encoder import Encoder, build_encoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "research": {},
    "production": {
        "relative_bias": False,
        "time_embedding": True,
        "affine_norms": True,
        "gate_only_activation": True,
        "scaled_scores": True,
        "concat_output": True,
    },
    "softmax": {"attention_activation": "softmax", "relative_bias": False},
    "sasrec": {"kind": "sasrec"},
}


def states_and_gradients(
    encoder: Encoder, *, kernel: KernelName, dropout: torch.Generator | None = None
) -> dict[str, Tensor]:
    """States of three rows, one of them empty, and the gradients of the items and of every parameter."""
    device = next(encoder.parameters()).device
    offsets = torch.tensor([0, 5, 5, 8], device=device)
    times_ms = torch.arange(9, device=device) * 90_000_000
    item_LD = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    known_L = torch.arange(8, device=device) != 2
    u_LD = encoder(item_LD, known_L, offsets, (times_ms[:-1], times_ms[1:]), dropout=dropout, kernel=kernel)
    upstream = torch.randn(u_LD.shape, generator=torch.Generator().manual_seed(2)).to(u_LD)
    named = {"items": item_LD, **dict(encoder.named_parameters())}
    grads = torch.autograd.grad(u_LD, list(named.values()), upstream)
    return {"states": u_LD, **dict(zip(named, grads, strict=True))}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_an_encoder_on_its_device_equals_the_reference_on_the_cpu(
    options: dict[str, Any], small_config: ModelConfig
) -> None:
    encoder = build_encoder(replace(small_config, **options), torch.Generator().manual_seed(0))
    want = states_and_gradients(encoder, kernel="reference")
    got = states_and_gradients(copy.deepcopy(encoder).to(DEVICE), kernel="triton")
    for name, tensor in want.items():
        assert torch.allclose(got[name].cpu(), tensor, rtol=1e-4, atol=1e-5), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="interpreted, matrix products of bfloat16 are wrong")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_an_encoder_trains_in_bfloat16_with_dropout(options: dict[str, Any], small_config: ModelConfig) -> None:
    encoder = build_encoder(replace(small_config, **options), torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = states_and_gradients(encoder, kernel="auto", dropout=torch.Generator(DEVICE).manual_seed(3))
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert all(tensor.dtype == torch.float32 for name, tensor in got.items() if name != "states")
