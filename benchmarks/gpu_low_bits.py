"""Fewer bits on a GPU: the products of an HSTU layer in 8-bit floats.

FLOP convention: as in gpu_encoder.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_attention import BACKWARD_BY_FORWARD, dense_rows
from benchmarks.gpu_harness import Arm, Bench, Calls, Case
from kernels.fp8_product import ProductFormat, fp8_product
from model.config import ModelConfig
from model.hstu import HSTULayer

STEP = "forward+backward"
LAYER_HEAD_WIDTH = 64


def fp8(bench: Bench) -> None:
    """A layer's first product [L, D] x [D, 4 D] alone, and whole layers, with plain and with 8-bit products.

    relative_error: of what the forward pass returns, beside the same in float32 (for the layer: of what it adds to its
    input).
    """
    for width in bench.sizes.product_widths:
        bench.run(_product_case(bench, width))
        bench.run(_layer_case(bench, width))


def _product_case(bench: Bench, width: int) -> Case:
    num = bench.sizes.product_positions
    x_LD = bench.randn(num, width).requires_grad_()
    weight_DE = bench.randn(width, 4 * width, std=width**-0.5).requires_grad_()
    with torch.no_grad():
        exact = x_LD.float() @ weight_DE.float()
    products: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"plain": torch.matmul, "fp8": fp8_product}
    arms = [
        Arm(
            name=f"product, {name}",
            make=functools.partial(_calls, functools.partial(product, x_LD, weight_DE), [x_LD, weight_DE]),
            extra=functools.partial(_error, functools.partial(product, x_LD, weight_DE), exact),
        )
        for name, product in products.items()
    ]
    forward = 2.0 * num * width * 4 * width
    return Case(shape={"L": num, "D": width, "E": 4 * width}, arms=arms, work={"forward": forward, STEP: 3 * forward})


def _layer_case(bench: Bench, width: int) -> Case:
    sizes = bench.sizes
    rows = dense_rows(bench, sizes.product_len, sizes.product_positions)
    head = min(LAYER_HEAD_WIDTH, width)
    config = ModelConfig(
        embedding_dim=width,
        num_layers=1,
        num_heads=width // head,
        attention_dim=head,
        hidden_dim=head,
        max_len=rows.length,
        relative_bias=False,
    )
    x_LD = bench.randn(rows.num_positions, width).requires_grad_()
    nothing = torch.zeros(rows.num_positions, dtype=torch.int64, device=bench.device)

    def layer(product: ProductFormat, dtype: torch.dtype) -> HSTULayer:
        made = HSTULayer(config, torch.Generator().manual_seed(0)).to(bench.device, dtype)
        made.product = product
        return made

    def added(one: HSTULayer, x_LD: Tensor) -> Tensor:
        out: Tensor = one(x_LD, rows.offsets, (nothing, nothing), dropout=None, kernel="triton")
        return out - x_LD

    with torch.no_grad():
        exact = added(layer("plain", torch.float32), x_LD.float())
    formats: tuple[ProductFormat, ...] = ("plain", "fp8")
    arms = []
    for product in formats:
        made = layer(product, bench.dtype)
        call = functools.partial(added, made, x_LD)
        arms.append(
            Arm(
                name=f"layer, {product}",
                ours=True,
                make=functools.partial(_calls, call, [x_LD, *made.parameters()]),
                extra=functools.partial(_error, call, exact),
            )
        )
    pairs = 4.0 * width * rows.causal_pairs
    products = 5 * 2.0 * rows.num_positions * width**2
    work = {"forward": pairs + products, STEP: pairs * (1 + BACKWARD_BY_FORWARD) + 3 * products}
    return Case(shape=rows.shape(D=width, H=config.num_heads), arms=arms, work=work)


def _calls(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Calls:
    out = forward()
    grad = torch.empty_like(out).normal_(generator=torch.Generator(out.device).manual_seed(1))
    del out
    return {"forward": forward, STEP: lambda: torch.autograd.grad(forward(), inputs, grad)}


@torch.no_grad()
def _error(forward: Callable[[], Tensor], exact: Tensor) -> Mapping[str, Any]:
    return {"relative_error": round(float((forward().float() - exact).norm() / exact.norm()), 6)}
