"""Fewer bits on a GPU: the products of an HSTU layer in 8-bit floats, and item rows that are sent rounded.

FLOP convention: as in gpu_encoder.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_attention import BACKWARD_BY_FORWARD, dense_rows
from benchmarks.gpu_harness import Arm, Bench, Calls, Case
from kernels.fp8_product import ProductFormat, fp8_product
from model.compute import Compute
from model.config import ROW_PRECISIONS, ModelConfig, RowPrecision
from model.device_rows import DeviceRows
from model.hstu import HSTULayer
from model.item_table import ItemTable
from model.row_precision import bytes_of_row

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


def rows(bench: Bench) -> None:
    """The whole catalogue, and the rows of a step, from host memory to embeddings on the device; rate of float32 bytes.

    sent_bytes: what goes over. What a step changed is rounded before (`model.device_rows`), as in every step.
    """
    sizes = bench.sizes
    for num_items in sizes.catalogues:
        arms = [
            Arm(name=precision, make=functools.partial(_sending, bench, num_items, precision), extra=extra)
            for precision in ROW_PRECISIONS
            for extra in [functools.partial(_sent_bytes, sizes.loss_width, num_items, precision)]
        ]
        work = {
            "catalogue": 4.0 * sizes.loss_width * num_items,
            "step": 4.0 * sizes.loss_width * min(sizes.sent_rows, num_items),
        }
        shape = {"V": num_items, "D": sizes.loss_width, "R": min(sizes.sent_rows, num_items)}
        bench.run(Case(shape=shape, arms=arms, work=work, rate="GB/s"))


def _sending(bench: Bench, num_items: int, precision: RowPrecision) -> Calls:
    items = ItemTable(ModelConfig(embedding_dim=bench.sizes.loss_width))
    items.admit(np.arange(num_items))
    of_step = torch.randperm(num_items, generator=torch.Generator().manual_seed(0))[: bench.sizes.sent_rows]
    everything, send = slice(0, num_items), Compute(device=bench.device).send
    if precision == "float32":
        return {"catalogue": lambda: send(items.weight[everything]), "step": lambda: send(items.weight[of_step])}
    sent = DeviceRows(items, precision)
    sent.refresh()

    def step() -> Tensor:
        items.mark_changed(of_step)
        return sent.weight(of_step, send)

    return {"catalogue": lambda: sent.weight(everything, send), "step": step}


def _sent_bytes(width: int, num_items: int, precision: RowPrecision) -> Mapping[str, Any]:
    return {"sent_bytes": bytes_of_row(width, precision) * num_items}
