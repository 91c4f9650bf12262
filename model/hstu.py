"""HSTU, as in the authors' research code (arXiv 2402.17152), and the production layer's differences as options.

Semi-local attention and truncated layers are those of ULTRA-HSTU (arXiv 2602.16986). The attention itself is in
kernels/hstu_attention/README.md.

Shapes: L packed positions, D model width, H heads, A query/key width, V value width, G = H * V, N = max_len.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.fp8_product import ProductFormat
from kernels.hstu_attention import CAUSAL, AttentionMask, RelativeBias, hstu_attention
from kernels.hstu_decode import LayerForm, LayerWeights, hstu_decode, is_available, takes
from kernels.hstu_input import hstu_input
from kernels.hstu_output import hstu_output
from kernels.implementations import KernelName, choose
from kernels.softmax_attention import softmax_attention
from model.config import ModelConfig
from model.history_input import HistoryInput
from model.initial import NORM_EPS, dropout_seed, normal, xavier
from model.key_values import KeyValues, packed_places
from model.recomputed_layer import Entered, recomputed, recomputed_under_window

_PRODUCTS_MAX = 1 << 25
"""New positions times numbers of a layer's input matrix up to which compiled code computes them in one call: on one
thread it is faster beyond that too, but operation by operation all threads of the machine share the work."""


class HSTULayer(nn.Module):
    """One layer: ``x + W_o dropout(u * norm(attention(q, k, v)))`` with ``u, v, q, k = split(silu(W norm(x)))``.

    The norms are required for stability, since nothing else bounds the sums. Options of ModelConfig: affine_norms,
    gate_only_activation (only ``u`` passes through SiLU), scaled_scores, concat_output, relative_bias,
    attention_activation, recompute.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        gate, attention = config.num_heads * config.hidden_dim, config.num_heads * config.attention_dim
        self.split_sizes = [gate, gate, attention, attention]
        self.uvqk = nn.Parameter(normal(generator, config.embedding_dim, 2 * gate + 2 * attention))
        self.output_weight = nn.Parameter(
            xavier(generator, gate * (3 if config.concat_output else 1), config.embedding_dim)
        )
        self.output_bias = nn.Parameter(torch.zeros(config.embedding_dim))
        self.has_relative_bias = config.plan().has_relative_bias
        if self.has_relative_bias:
            self.position_weight = nn.Parameter(normal(generator, 2 * config.max_len - 1))
            self.time_weight = nn.Parameter(normal(generator, config.num_time_buckets + 1))
        self.input_norm = _Affine(config.embedding_dim) if config.affine_norms else None
        self.output_norm = _Affine(gate) if config.affine_norms else None
        self.product: ProductFormat = "plain"

    def forward(
        self,
        x_LD: Tensor,
        offsets: Tensor,
        times: tuple[Tensor, Tensor],
        *,
        mask: AttentionMask = CAUSAL,
        dropout: torch.Generator | None,
        kernel: KernelName = "auto",
        kept: tuple[KeyValues, int] | None = None,
    ) -> Tensor:
        """x_LD of the next layer. times: int64 seconds of each position and of its query.

        mask: silu attention only; softmax attention is always causal. kept: where keys and values are kept, and the
        number of this layer; then x_LD, and the times of queries, are of the new positions only.
        """
        config = self.config
        query_offsets = None if kept is None else kept[0].query_offsets
        attend = partial(
            self._attend, offsets=offsets, times=times, query_offsets=query_offsets, mask=mask, kernel=kernel
        )
        seed = None if dropout is None or config.linear_dropout == 0.0 else dropout_seed(dropout)
        weights = self.weights()
        enter = partial(self._enter, weights=weights, kernel=kernel)
        leave = partial(self._leave, weights=weights, seed=seed, kernel=kernel)
        if config.recompute and torch.is_grad_enabled() and kept is None:
            # The fused output half recomputes by itself.
            is_fused = self.product == "plain" and choose(kernel, x_LD.device, has_cpu_path=False) != "reference"
            if mask.max_attn_len is not None and not is_fused:
                return recomputed_under_window(config, attend, leave, x_LD, weights, product=self.product)
            return recomputed(partial(enter, recompute=False), attend, leave, x_LD, weights, is_fused=is_fused)
        entered = enter(x_LD)
        k_LHA, v_LHV = entered.k_LHA, entered.v_LHV
        if kept is not None:
            k_LHA, v_LHV = kept[0].put(kept[1], k_LHA, v_LHV)
        return leave(attend(entered.q_LHA, k_LHA, v_LHV).flatten(1), entered.u_LG, x_LD)

    def _enter(self, x_LD: Tensor, *, weights: LayerWeights, kernel: KernelName, recompute: bool = True) -> Entered:
        norm_weight, norm_bias = weights.input_norm or (None, None)
        entered = hstu_input(
            x_LD,
            weights.uvqk_DE,
            split_sizes=self.split_sizes,
            norm_weight_D=norm_weight,
            norm_bias_D=norm_bias,
            eps=NORM_EPS,
            activate="u" if self.config.gate_only_activation else "uvqk",
            recompute=recompute,
            product=self.product,
            kernel=kernel,
        )
        config = self.config
        return Entered(
            u_LG=entered.u_LG,
            q_LHA=entered.q_LA.view(-1, config.num_heads, config.attention_dim),
            k_LHA=entered.k_LA.view(-1, config.num_heads, config.attention_dim),
            v_LHV=entered.v_LG.view(-1, config.num_heads, config.hidden_dim),
        )

    def _leave(
        self,
        attended_LG: Tensor,
        u_LG: Tensor,
        x_LD: Tensor,
        *,
        weights: LayerWeights,
        seed: int | None,
        kernel: KernelName,
    ) -> Tensor:
        norm_weight, norm_bias = weights.output_norm or (None, None)
        return hstu_output(
            attended_LG,
            u_LG,
            x_LD,
            weights.output_WD,
            bias_D=weights.output_bias_D,
            norm_weight_G=norm_weight,
            norm_bias_G=norm_bias,
            eps=NORM_EPS,
            concat=self.config.concat_output,
            dropout_p=self.config.linear_dropout,
            seed=seed,
            product=self.product,
            kernel=kernel,
        )

    def weights(self) -> LayerWeights:
        """All of them, for ``hstu_decode``."""
        norms = (None if norm is None else (norm.weight, norm.bias) for norm in (self.input_norm, self.output_norm))
        input_norm, output_norm = norms
        has_bias = self.has_relative_bias
        return LayerWeights(
            uvqk_DE=self.uvqk,
            output_WD=self.output_weight,
            output_bias_D=self.output_bias,
            input_norm=input_norm,
            output_norm=output_norm,
            position_weight=self.position_weight if has_bias else None,
            time_weight=self.time_weight if has_bias else None,
        )

    def _attend(
        self,
        q_LHA: Tensor,
        k_LHA: Tensor,
        v_LHV: Tensor,
        offsets: Tensor,
        times: tuple[Tensor, Tensor],
        *,
        query_offsets: Tensor | None,
        mask: AttentionMask,
        kernel: KernelName,
    ) -> Tensor:
        config = self.config
        if config.attention_activation == "softmax":
            assert mask.is_causal_only and query_offsets is None, "softmax attention is causal, over all positions"  # noqa: PT018
            return softmax_attention(q_LHA, k_LHA, v_LHV, offsets)
        bias = None
        if self.has_relative_bias:
            bias = RelativeBias(
                position_weight=self.position_weight,
                time_weight=self.time_weight,
                timestamps_s_L=times[0],
                query_timestamps_s_M=times[1],
            )
        return hstu_attention(
            q_LHA,
            k_LHA,
            v_LHV,
            offsets,
            max_len=config.max_len,
            alpha=config.attention_dim**-0.5 if config.scaled_scores else 1.0,
            bias=bias,
            mask=mask,
            query_offsets=query_offsets,
            kernel=kernel,
        )


class _Decoder(NamedTuple):
    """Layers as ``hstu_decode`` takes them."""

    weights: list[LayerWeights]
    form: LayerForm
    mask: AttentionMask

    @classmethod
    def of(cls, layers: list[HSTULayer], mask: AttentionMask) -> _Decoder | None:
        """None: there are no such layers."""
        if not layers:
            return None
        config = layers[0].config  # truncated layers have a max_len of their own
        form = LayerForm(
            heads=config.num_heads,
            attention_dim=config.attention_dim,
            hidden_dim=config.hidden_dim,
            max_len=config.max_len,
            alpha=config.attention_dim**-0.5 if config.scaled_scores else 1.0,
            eps=NORM_EPS,
            gate_only=config.gate_only_activation,
            concat=config.concat_output,
        )
        return cls([layer.weights() for layer in layers], form, mask)


class HSTU(nn.Module):
    """The layers over jagged rows of embeddings, and what comes before the first one.

    With ``truncated_layers`` the last of them read the newest of each history only (ULTRA-HSTU, arXiv 2602.16986,
    attention truncation); positions before that leave the encoder as the layers before gave them.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator, *, num_targets_max: int = 0) -> None:
        """config: its lengths count positions, whose rows end with at most num_targets_max targets."""
        super().__init__()
        self.config, self.num_targets_max = config, num_targets_max
        plan = config.plan()
        assert not plan.reads_actions, "tokens are made by the caller"
        self.plan = plan
        self.num_whole = config.num_layers - plan.num_truncated
        self.input = HistoryInput(config, generator)
        # What sums are divided by is the most that can be summed.
        truncated = replace(
            config, max_len=plan.truncated_len, truncated_layers=0, truncated_len=None, truncated_hop=None
        )
        self.layers = nn.ModuleList(
            HSTULayer(config if number < self.num_whole else truncated, generator)
            for number in range(config.num_layers)
        )

    def forward(
        self,
        item_LD: Tensor,
        known_L: Tensor,
        offsets: Tensor,
        times_ms: tuple[Tensor, Tensor],
        *,
        dropout: torch.Generator | None = None,
        kernel: KernelName = "auto",
    ) -> Tensor:
        """u_LD of unit length, one state per position of a history.

        item_LD: float[L, D]. known_L: bool[L], False where the input is to read as zeros. times_ms: int64[L] epoch
        ms of each position, and of the next interaction or request. dropout: generator of a training pass, None
        for inference. ValueError if a row is longer than max_len.
        """
        x_LD = self.hidden_states(item_LD, known_L, offsets, times_ms, dropout=dropout, kernel=kernel)
        return functional.normalize(x_LD, dim=1, eps=NORM_EPS)

    def hidden_states(
        self,
        item_LD: Tensor,
        known_L: Tensor | None,
        offsets: Tensor,
        times_ms: tuple[Tensor, Tensor],
        *,
        places_L: Tensor | None = None,
        num_targets_B: Tensor | None = None,
        dropout: torch.Generator | None = None,
        kernel: KernelName = "auto",
    ) -> Tensor:
        """x_LD behind the last layer, of any length; arguments as ``forward``, known_L None where all are.

        places_L: int64[L], the place of each position in its row, as the mask counts places; None: its index.
        num_targets_B: int64[B], targets at the end of each row; None: there are none.
        """
        times_s = (times_ms[0] // 1000, times_ms[1] // 1000)
        x_LD: Tensor = self.input(item_LD, known_L, offsets, times_s, places_L=places_L, dropout=dropout)
        mask = self._mask(num_targets_B)
        for layer in self._whole():
            x_LD = layer(x_LD, offsets, times_s, mask=mask, dropout=dropout, kernel=kernel)
        if not self.plan.num_truncated:
            return x_LD
        starts_B = self.truncated_starts(offsets.diff() if num_targets_B is None else offsets.diff() - num_targets_B)
        counts_B = offsets.diff() - starts_B
        newest_W = packed_places(offsets[:-1] + starts_B, counts_B)
        newest_offsets = torch.cat([offsets[:1], counts_B.cumsum(0)])
        x_WD, times_s = x_LD.index_select(0, newest_W), (times_s[0][newest_W], times_s[1][newest_W])
        mask = self._mask(num_targets_B, longest=self.plan.truncated_len)
        for layer in self._truncated():
            x_WD = layer(x_WD, newest_offsets, times_s, mask=mask, dropout=dropout, kernel=kernel)
        return x_LD.index_copy(0, newest_W, x_WD)

    def extended_states(
        self,
        item_MD: Tensor,
        known_M: Tensor | None,
        times_ms: tuple[Tensor, Tensor],
        kept: KeyValues,
        *,
        num_targets_B: Tensor | None = None,
        kernel: KernelName = "auto",
    ) -> Tensor:
        """x_MD as ``hidden_states``, of the new positions of rows whose other keys and values are kept; inference.

        times_ms: int64[L] of all positions, and of all positions' queries. Not with ``time_embedding`` or softmax
        attention, under which what is kept does not stay valid. Where layers are truncated, x of the positions that
        ``kept.newest.kept`` calls new, among which are the last of each row.
        """
        mask = self._mask(num_targets_B)
        times_s = (times_ms[0] // 1000, times_ms[1] // 1000)
        asked_s = (times_s[0], times_s[1][kept.new_M])
        x_MD: Tensor = self.input(item_MD, known_M, kept.offsets, asked_s, places_L=kept.places_M, dropout=None)
        x_MD = self._extended(x_MD, asked_s, kept, truncated=False, mask=mask, kernel=kernel)
        if not self.plan.num_truncated:
            return x_MD
        newest = kept.newest
        assert newest is not None, "what the truncated layers read"
        x_MD, own = newest.put(x_MD), newest.kept
        asked_s = (times_s[0][newest.places_W], times_s[1][newest.places_W[own.new_M]])
        mask = self._mask(num_targets_B, longest=self.plan.truncated_len)
        return self._extended(x_MD, asked_s, own, truncated=True, mask=mask, kernel=kernel)

    def _extended(
        self,
        x_MD: Tensor,
        times_s: tuple[Tensor, Tensor],
        kept: KeyValues,
        *,
        truncated: bool,
        mask: AttentionMask,
        kernel: KernelName,
    ) -> Tensor:
        """x_MD behind the layers that read all, or the truncated ones, whose keys and values are the ones kept."""
        if kernel == "auto" and takes(mask) and self.decodes(x_MD.shape[0], x_MD.dtype):
            return self.decoded(x_MD, times_s, kept, truncated=truncated)
        for number, layer in enumerate(self._truncated() if truncated else self._whole()):
            x_MD = layer(x_MD, kept.offsets, times_s, mask=mask, dropout=None, kernel=kernel, kept=(kept, number))
        return x_MD

    def decodes(self, num_new: int, dtype: torch.dtype) -> bool:
        """Whether compiled code for one position at a time is there, and faster than all at once."""
        config = self.config
        width = 2 * config.num_heads * (config.hidden_dim + config.attention_dim)
        is_small = num_new * config.embedding_dim * width <= _PRODUCTS_MAX
        return is_small and is_available(dtype, self.input.position_embedding.device)

    def decoded(
        self, x_MD: Tensor, times_s: tuple[Tensor, Tensor], kept: KeyValues, *, truncated: bool = False
    ) -> Tensor:
        """x_MD behind the layers that read all of a history, or the truncated ones, by compiled code.

        times_s: of the L positions, and of the M queries. Where ``decodes`` says so, and nothing is a target.
        """
        decoder = self._decoders[truncated]
        assert decoder is not None, "there are such layers"
        query_offsets = kept.offsets if kept.query_offsets is None else kept.query_offsets
        return hstu_decode(
            x_MD,
            kept.layers,
            decoder.weights,
            offsets=kept.offsets,
            query_offsets=query_offsets,
            times_s=times_s,
            form=decoder.form,
            mask=decoder.mask,
        )

    @cached_property
    def _decoders(self) -> tuple[_Decoder | None, _Decoder | None]:
        """Of the layers that read all, and of the truncated ones; they see the parameters, whatever these become."""
        mask = self._mask(None, longest=self.plan.truncated_len)
        return _Decoder.of(list(self._whole()), self._mask(None)), _Decoder.of(list(self._truncated()), mask)

    def truncated_starts(self, lengths_B: Tensor) -> Tensor:
        """int64[B]: the first place of histories of these lengths that the truncated layers read."""
        hop = self.plan.truncated_hop
        beyond_B = (lengths_B - (self.plan.truncated_len - self.num_targets_max)).clamp(min=0)
        return (beyond_B + hop - 1) // hop * hop

    def _whole(self) -> Iterator[HSTULayer]:
        return islice(cast("Iterable[HSTULayer]", self.layers), self.num_whole)

    def _truncated(self) -> Iterator[HSTULayer]:
        return islice(cast("Iterable[HSTULayer]", self.layers), self.num_whole, None)

    def _mask(self, num_targets_B: Tensor | None, *, longest: int | None = None) -> AttentionMask:
        """longest: positions of a row at most; None: max_len."""
        plan = self.plan
        if plan.local_len is None or plan.local_len >= (longest or self.config.max_len) - 1:
            return CAUSAL if num_targets_B is None else AttentionMask(num_targets_B=num_targets_B)
        is_of_queries = plan.global_attn == "newest_queries"
        return AttentionMask(
            num_targets_B=num_targets_B,
            max_attn_len=plan.local_len,
            min_full_attn_len=plan.global_len if is_of_queries else 0,
            num_oldest_keys=0 if is_of_queries else plan.global_len,
        )


class _Affine(nn.Module):
    """Scale and shift of a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
