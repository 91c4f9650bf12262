"""Whole encoders against a Transformer of equal width, and what the halves of an HSTU layer keep for the backward pass.

FLOP convention: a product of [m, k] and [k, n] is 2 m k n, three times that with its backward pass; attention as in
gpu_attention.py; only positions that exist count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

import model.hstu
from benchmarks import yardsticks
from benchmarks.gpu_attention import BACKWARD_BY_FORWARD, Rows, dense_rows, relative_bias, stochastic_rows
from benchmarks.gpu_harness import Arm, Bench, Calls, Case, Row
from kernels.hstu_attention import RelativeBias, hstu_attention
from kernels.hstu_input import hstu_input
from kernels.hstu_output import hstu_output
from kernels.implementations import KernelName
from model.config import ModelConfig
from model.hstu import HSTU, HSTULayer

STEP = "forward+backward"


def encoder(bench: Bench) -> None:
    """One training step without loss and optimiser, dense and jagged, bfloat16 autocast."""
    sizes = bench.sizes
    for length in sizes.encoder_lengths:
        batches = [dense_rows(bench, length, sizes.encoder_positions)]
        batches += [stochastic_rows(bench, length, sizes.encoder_positions, alpha) for alpha in sizes.alphas]
        for rows in batches:
            bench.run(_encoder_case(bench, rows))


def _encoder_case(bench: Bench, rows: Rows) -> Case:
    sizes = bench.sizes
    pairs = 4.0 * sizes.width * rows.causal_pairs * (1 + BACKWARD_BY_FORWARD)
    squares = 2.0 * rows.num_positions * sizes.width**2 * 3  # one D x D product of every position
    hstu_work = {STEP: sizes.num_layers * (pairs + 5 * squares)}
    transformer_work = {STEP: sizes.num_layers * (pairs + 12 * squares)}
    arms = [
        Arm(name="HSTU", ours=True, make=functools.partial(_hstu, bench, rows, bias=True)),
        Arm(name="HSTU, no bias", ours=True, make=functools.partial(_hstu, bench, rows, bias=False)),
    ]
    if not hasattr(model.hstu, "hstu_input"):
        arms.append(
            Arm(name="HSTU, fused halves", ours=True, make=functools.partial(_hstu, bench, rows, bias=True, fused=True))
        )
    arms += [
        Arm(name="Transformer, padded FA-2", work=transformer_work, make=lambda: _padded_transformer(bench, rows)),
        Arm(name="Transformer, varlen FA-2", work=transformer_work, make=lambda: _varlen_transformer(bench, rows)),
    ]
    shape = rows.shape(D=sizes.width, H=sizes.encoder_heads, layers=sizes.num_layers)
    return Case(shape=shape, arms=arms, work=hstu_work)


def speedup(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By batch and Transformer: its time by that of HSTU with the bias, the faster form of it."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if "error" in row or not row["arm"].startswith("Transformer"):
            continue
        shape = row["shape"]
        ours = [
            other["ms"] for other in rows if other["shape"] == shape and other["arm"] in _WITH_BIAS and "ms" in other
        ]
        if ours:
            name = f"{shape['rows']} N={shape['N']}"
            found.setdefault(name, {})[row["arm"]] = round(row["ms"] / min(ours), 3)
    return found


_WITH_BIAS = ("HSTU", "HSTU, fused halves")


def _hstu(bench: Bench, rows: Rows, *, bias: bool, fused: bool = False) -> Calls:
    encoder_ = HSTU(_config(bench, rows.length, bias=bias), torch.Generator().manual_seed(0)).to(bench.device)
    item_LD = bench.randn(rows.num_positions, bench.sizes.width, std=0.02, dtype=torch.float32).requires_grad_()
    known_L = torch.ones(rows.num_positions, dtype=torch.bool, device=bench.device)
    times = relative_bias(bench, rows)
    times_ms = (times.timestamps_s_L * 1000, times.query_timestamps_s_M * 1000)

    def forward() -> Tensor:
        with _autocast(bench):
            if fused:
                return _fused_hstu(encoder_, item_LD, known_L, rows.offsets, times_ms, bench.dtype)
            encoded: Tensor = encoder_(item_LD, known_L, rows.offsets, times_ms, kernel="triton")
            return encoded

    return _step(forward, [item_LD, *encoder_.parameters()])


def _fused_hstu(
    encoder_: HSTU,
    item_LD: Tensor,
    known_L: Tensor,
    offsets: Tensor,
    times_ms: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    times_s = (times_ms[0] // 1000, times_ms[1] // 1000)
    x_LD = encoder_.input(item_LD, known_L, offsets, times_s, dropout=None).to(dtype)
    for layer in encoder_.layers:
        assert isinstance(layer, HSTULayer)
        x_LD = fused_layer(layer, x_LD, offsets, times_s)
    return functional.normalize(x_LD.float(), dim=1)


def fused_layer(
    layer: HSTULayer,
    x_LD: Tensor,
    offsets: Tensor,
    times_s: tuple[Tensor, Tensor],
    *,
    recompute: bool = True,
    kernel: KernelName = "triton",
) -> Tensor:
    """The layer's research form by the fused halves, in the dtype of x."""
    config, dtype = layer.config, x_LD.dtype
    halves = hstu_input(x_LD, layer.uvqk.to(dtype), split_sizes=layer.split_sizes, recompute=recompute, kernel=kernel)
    bias = None
    if layer.has_relative_bias:
        bias = RelativeBias(
            position_weight=layer.position_weight,
            time_weight=layer.time_weight,
            timestamps_s_L=times_s[0],
            query_timestamps_s_M=times_s[1],
        )
    o_LHV = hstu_attention(
        halves.q_LA.view(-1, config.num_heads, config.attention_dim),
        halves.k_LA.view(-1, config.num_heads, config.attention_dim),
        halves.v_LG.view(-1, config.num_heads, config.hidden_dim),
        offsets,
        max_len=config.max_len,
        bias=bias,
        kernel=kernel,
    )
    return hstu_output(
        o_LHV.flatten(1),
        halves.u_LG,
        x_LD,
        layer.output_weight.to(dtype),
        bias_D=layer.output_bias.to(dtype),
        recompute=recompute,
        kernel=kernel,
    )


def _padded_transformer(bench: Bench, rows: Rows) -> Calls:
    attend = yardsticks.sdpa(SDPBackend.FLASH_ATTENTION)
    return _transformer(bench, attend, (len(rows.lengths), rows.length, bench.sizes.width))


def _varlen_transformer(bench: Bench, rows: Rows) -> Calls:
    attend = yardsticks.varlen(rows.offsets, rows.length)
    return _transformer(bench, attend, (rows.num_positions, bench.sizes.width))


def _transformer(bench: Bench, attend: yardsticks.Attention, shape: tuple[int, ...]) -> Calls:
    sizes = bench.sizes
    built = yardsticks.Transformer(width=sizes.width, num_heads=sizes.encoder_heads, num_layers=sizes.num_layers)
    transformer = built.to(bench.device)
    x = bench.randn(*shape, dtype=torch.float32).requires_grad_()

    def forward() -> Tensor:
        with _autocast(bench):
            out: Tensor = transformer(x, attend)
            return out

    return _step(forward, [x, *transformer.parameters()])


def _step(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Calls:
    """Both passes; a random gradient, so that none of it is a broadcast."""
    out = forward()
    grad = torch.empty_like(out).normal_(generator=torch.Generator(out.device).manual_seed(1))
    del out
    return {STEP: lambda: torch.autograd.grad(forward(), inputs, grad)}


def _autocast(bench: Bench) -> torch.autocast:
    return torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=bench.dtype == torch.bfloat16)


def _config(bench: Bench, length: int, *, bias: bool) -> ModelConfig:
    sizes = bench.sizes
    width = sizes.width // sizes.encoder_heads
    return ModelConfig(
        embedding_dim=sizes.width,
        num_layers=sizes.num_layers,
        num_heads=sizes.encoder_heads,
        attention_dim=width,
        hidden_dim=width,
        max_len=length,
        relative_bias=bias,
    )


# ----------------------------------------------------------------------------------------------------------------------
# What is kept for the backward pass


def input_output(bench: Bench) -> None:
    """One layer, with and without recomputation: its step's time, and what the forward pass leaves allocated.

    kept_bytes: allocated after the forward pass beyond what was before, the layer's output included, its input and
    parameters not. As in ULTRA-HSTU's measurement: D 512, 256 rows of 3072.
    """
    sizes = bench.sizes
    rows = dense_rows(bench, sizes.layer_len, sizes.layer_len * sizes.layer_rows)
    layer = HSTULayer(_config(bench, rows.length, bias=False), torch.Generator().manual_seed(0))
    layer = layer.to(bench.device, bench.dtype)
    again = HSTULayer(replace(layer.config, recompute=True), torch.Generator().manual_seed(0))
    again = again.to(bench.device, bench.dtype)
    x_LD = bench.randn(rows.num_positions, sizes.width).requires_grad_()
    nothing = torch.zeros(rows.num_positions, dtype=torch.int64, device=bench.device)
    call = functools.partial(fused_layer, layer, x_LD, rows.offsets, (nothing, nothing))
    forwards: dict[str, Callable[[], Tensor]] = {
        "model.hstu": lambda: layer(x_LD, rows.offsets, (nothing, nothing), dropout=None, kernel="triton"),
        "model.recompute": lambda: again(x_LD, rows.offsets, (nothing, nothing), dropout=None, kernel="triton"),
        "halves, kept": functools.partial(call, recompute=False),
        "halves, recomputed": functools.partial(call, recompute=True),
        "whole layer checkpointed": lambda: _checkpointed(call),
    }
    arms = [
        _kept_arm(bench, again if name == "model.recompute" else layer, x_LD, name, forward)
        for name, forward in forwards.items()
    ]
    positions, pairs = rows.num_positions, rows.causal_pairs
    attention_work = 4.0 * sizes.width * pairs * (1 + BACKWARD_BY_FORWARD)
    work = {STEP: attention_work + 5 * 3 * 2.0 * positions * sizes.width**2}
    bench.run(Case(shape=rows.shape(D=sizes.width, H=sizes.encoder_heads), arms=arms, work=work))


def _kept_arm(bench: Bench, layer: HSTULayer, x_LD: Tensor, name: str, forward: Callable[[], Tensor]) -> Arm:
    kept: dict[str, int | None] = {"kept_bytes": None}

    def make() -> Calls:
        calls = _step(forward, [x_LD, *layer.parameters()])
        kept["kept_bytes"] = _kept_bytes(bench, forward)
        return calls

    def extra() -> Mapping[str, Any]:
        return dict(kept)

    return Arm(name=name, ours=name != "whole layer checkpointed", make=make, extra=extra)


def _kept_bytes(bench: Bench, forward: Callable[[], Tensor]) -> int | None:
    if bench.device.type != "cuda":
        return None
    torch.cuda.synchronize(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    out = forward()
    kept = torch.cuda.memory_allocated(bench.device) - before
    del out
    return kept


def _checkpointed(call: Callable[[], Tensor]) -> Tensor:
    out: Tensor = checkpoint(call, use_reentrant=False)
    return out
