"""Settings of the model, its loss and its optimiser."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal, get_args

from model.encoder_plan import Attention, EncoderPlan, GlobalAttention, Tokens
from model.transducers import Transducer, check_transducers, part_config

_NOT_IN_HASH: Final = (
    "max_items",
    "recompute",
    "tokens",
    "value_thresholds",
    "surfaces",
    "attention",
    "local_attn_len",
    "global_attn_len",
    "global_attn",
    "truncated_layers",
    "truncated_len",
    "truncated_hop",
    "transducers",
)
DeviceChoice = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16", "fp8"]
RowPrecision = Literal["float32", "int8", "int4"]
"""Of item embeddings in snapshots and on the way to a device (model.row_precision)."""
ROW_PRECISIONS: Final[tuple[RowPrecision, ...]] = get_args(RowPrecision)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What the model is. Two models exchange weights only if all of this but max_items and recompute is equal."""

    kind: Literal["hstu", "ultra_hstu", "sasrec", "gru"] = "hstu"
    """Encoder of histories. hstu: pointwise attention. ultra_hstu: the same for longer histories, with other defaults
    for tokens, attention, truncated_layers and relative_bias. To compare with: sasrec, a softmax Transformer, and gru,
    a recurrent net."""
    tokens: Tokens | None = None
    """What the encoder reads of an interaction. items: its item. merged: item and action in one token. interleaved: two
    tokens, item, then action, at four times the attention. Not set: items, and merged for ultra_hstu."""
    value_thresholds: tuple[float, ...] = ()
    """Values of interactions (such as seconds watched) that merged and interleaved tokens tell apart, ascending."""
    surfaces: bool = False
    """Merged and interleaved tokens tell apart where interactions happened (events.surface_key). Needs a new model."""
    attention: Attention | None = None
    """What a position sees of those before it. full: all. semi_local: the local_attn_len newest, and more by
    global_attn. Not set: full, and semi_local for ultra_hstu."""
    local_attn_len: int = 256
    """Interactions before itself that a position of semi-local attention sees (K1). 0: none, only itself and what
    global_attn adds."""
    global_attn_len: int = 64
    """Interactions of a history that are let off that limit (K2), see global_attn."""
    global_attn: GlobalAttention = "newest_queries"
    """What lets them off. newest_queries: the newest interactions of a history see all before them, and so do
    candidates. oldest_keys: the oldest are seen by all behind them."""
    truncated_layers: int | None = None
    """Last layers of the encoder that read only the newest truncated_len interactions. Not set: 0, and half of
    num_layers, rounded down, for ultra_hstu."""
    truncated_len: int | None = None
    """Interactions that the truncated layers read at most. Not set: 512, or max_len if that is less."""
    truncated_hop: int | None = None
    """Interactions by which what they read moves on at a time, so that what is kept of a user stays valid meanwhile;
    1: with each. Not set: an eighth of truncated_len."""
    transducers: tuple[Transducer, ...] = ()
    """Encoders that each read the interactions with some actions only, with a length and depth of their own, and are
    fused: [{name = "views", actions = ["view"], max_len = 48}, {name = "deeds", actions = ["like", "purchase"],
    num_layers = 1}]. What is left out of max_len and num_layers is the model's. None: one encoder reads all."""
    embedding_dim: int = 64
    """Width D of item embeddings and of the residual stream."""
    num_layers: int = 2
    """Layers of the encoder; the research configuration for catalogues of this size."""
    num_heads: int = 2
    """Attention heads H of every layer."""
    attention_dim: int = 32
    """Query and key width A of one head."""
    hidden_dim: int = 32
    """Value and gate width V of one head."""
    max_len: int = 64
    """Newest interactions of a history that are read; also the constant N that attention sums are divided by."""
    attention_activation: Literal["silu", "softmax"] = "silu"
    """What turns a score into a weight. silu: pointwise, so that many related interactions weigh more than few.
    softmax: normalised over the keys, without relative bias; for comparison."""
    relative_bias: bool | None = None
    """Add a learned number per distance and per bucket of the time gap to every attention score. Sees when the
    request happens, so that a cached history stays valid for the next one. Not set: on, and off for ultra_hstu."""
    num_time_buckets: int = 128
    """Highest bucket of the relative time bias; each bucket is 1.35 times as long as the one before."""
    time_embedding: bool = False
    """Add a learned embedding of each interaction's age when its history ends (production layer's substitute for the
    relative bias). Where more than the newest position is supervised, the others so learn when the history ended."""
    affine_norms: bool = False
    """Give both norms of an HSTU layer learned scales and shifts (production layer)."""
    gate_only_activation: bool = False
    """SiLU on the gate alone, not on queries, keys and values (production layer)."""
    scaled_scores: bool = False
    """Divide attention scores by the root of attention_dim (production layer)."""
    concat_output: bool = False
    """Feed the output matrix [gate, attended, gated] instead of gated alone (production layer)."""
    input_dropout: float = 0.0
    """Share of input features dropped in training. 0: each interaction is learned once, so little is memorised."""
    linear_dropout: float = 0.0
    """Share of gated attention outputs dropped in training, before the output matrix of a layer."""
    recompute: bool = False
    """While training, keep of each HSTU layer only its input and what attention returned, and compute normed input, u,
    q, k, v and gated norm again for the gradients: a sixth of the memory, a few per cent of time with long histories.
    With semi-local attention on a CPU what u and v are made of is kept, too: a third of the memory, a tenth of time.
    Weights are the same, so it may be changed at any time."""
    temperature: float = 0.2
    """Cosine similarities start out divided by this; the scale is learned from there. The research code's 0.05 suits
    many passes: in one pass over a stream, untrained items then outweigh the trend (HR@10 0.96 against 1.05 times
    decayed popularity, other settings equal)."""
    trend_half_life_s: float = 2 * 86_400.0
    """Half-life in seconds of the decayed popularity that every score contains. Shorter than a baseline's best (7
    days), since the item biases remember the rest."""
    trend_floor: float = 0.1
    """Decayed interactions added to every item before the logarithm, so that a new item's trend is finite."""
    trend_coefficient: float = 1.0
    """Initial weight of the log decayed popularity in a score; learned from there. 1: start out as the trend."""
    item_init_std: float = 0.02
    """Standard deviation of a new item's embedding, around the mean of newcomer_window others."""
    newcomer_window: int = 512
    """A new item's embedding starts at the mean of those of so many items that came last: what is new is often alike.
    0: at zero."""
    max_items: int = 4_000_000
    """Items with a row at most; then the least popular make room for new ones (see [items]). Bounds memory, which is
    taken as items come: about 0.6 kB an item at width 64, optimiser included. Address space is reserved for all."""
    seed: int = 0
    """Seed of all initial weights; what is random in a new item's embedding is a function of this seed and its id."""

    def __post_init__(self) -> None:
        # Settings of an arm of a backtest come as JSON has them.
        object.__setattr__(self, "value_thresholds", tuple(self.value_thresholds))
        object.__setattr__(self, "transducers", tuple(Transducer.of(one) for one in self.transducers))
        _require_one_of(self, "kind", ("hstu", "ultra_hstu", "sasrec", "gru"))
        _require_one_of(self, "attention_activation", ("silu", "softmax"))
        plan = self.plan()
        if self.attention_activation == "softmax" and plan.has_relative_bias:
            raise ValueError("attention_activation is softmax, which has no relative bias: set relative_bias to false")
        if self.attention_activation == "softmax" and self.hidden_dim != self.attention_dim:
            raise ValueError(
                f"hidden_dim is {self.hidden_dim}; it must equal attention_dim ({self.attention_dim}) for softmax"
                " attention: change hidden_dim in the settings"
            )
        for name in ("embedding_dim", "num_layers", "num_heads", "attention_dim", "hidden_dim", "max_len"):
            _require(self, name, 1, 1 << 20)
        _require(self, "num_time_buckets", 1, 1024)
        _require(self, "max_items", 1, 1 << 31)
        _require(self, "newcomer_window", 0, 1 << 31)
        for name in ("input_dropout", "linear_dropout"):
            _require(self, name, 0.0, 0.95)
        for name in ("temperature", "trend_half_life_s", "trend_floor", "item_init_std"):
            _require(self, name, 1e-9, 1e12)
        _require(self, "trend_coefficient", 0.0, 100.0)
        _require(self, "seed", 0, (1 << 63) - 1)
        self._check_plan()

    def plan(self) -> EncoderPlan:
        """What the settings that are left to ``kind``, and those that a short history makes void, come to."""
        is_ultra = self.kind == "ultra_hstu"
        attention = self.attention or ("semi_local" if is_ultra else "full")
        is_local = attention == "semi_local" and self.local_attn_len < self.max_len - 1
        num_truncated = self.truncated_layers
        if num_truncated is None:
            num_truncated = self.num_layers // 2 if is_ultra else 0
        truncated_len = min(512, self.max_len) if self.truncated_len is None else self.truncated_len
        return EncoderPlan(
            tokens=self.tokens or ("merged" if is_ultra else "items"),
            has_relative_bias=not is_ultra if self.relative_bias is None else self.relative_bias,
            local_len=self.local_attn_len if is_local else None,
            global_len=self.global_attn_len if is_local else 0,
            global_attn=self.global_attn,
            num_truncated=num_truncated if truncated_len < self.max_len else 0,
            truncated_len=truncated_len,
            truncated_hop=max(1, truncated_len // 8) if self.truncated_hop is None else self.truncated_hop,
        )

    def _check_plan(self) -> None:
        _require_one_of(self, "global_attn", ("newest_queries", "oldest_keys"))
        for name, allowed in (("tokens", ("items", "merged", "interleaved")), ("attention", ("full", "semi_local"))):
            if getattr(self, name) is not None:
                _require_one_of(self, name, allowed)
        _require(self, "local_attn_len", 0, 1 << 20)
        _require(self, "global_attn_len", 0, 1 << 20)
        plan = self.plan()
        if self.kind in ("sasrec", "gru") and (
            plan.reads_actions or self.attention == "semi_local" or self.truncated_layers
        ):
            raise ValueError(f"tokens, attention and truncated_layers are for hstu and ultra_hstu: not for {self.kind}")
        if self.attention_activation == "softmax" and plan.local_len is not None:
            raise ValueError("attention is semi_local, which softmax attention is not: set attention to full")
        if plan.local_len == 0 and plan.global_len == 0:
            raise ValueError(
                "local_attn_len and global_attn_len are both 0, so that no position would see another: set one of them"
                " to 1 or more, or attention to full"
            )
        if self.truncated_layers is not None:
            _require(self, "truncated_layers", 0, self.num_layers - 1)
        if self.truncated_len is not None:
            _require(self, "truncated_len", 1, self.max_len)
        if self.truncated_hop is not None:
            _require(self, "truncated_hop", 1, plan.truncated_len)
        bounds = (-math.inf, *self.value_thresholds, math.inf)
        if not all(low < high for low, high in pairwise(bounds)):
            raise ValueError(f"value_thresholds is {list(self.value_thresholds)}; it must ascend and be finite")
        if self.value_thresholds and not plan.reads_actions:
            raise ValueError("value_thresholds is set, but tokens are items alone: set tokens to merged or interleaved")
        if self.surfaces and not plan.reads_actions:
            raise ValueError("surfaces is on, but tokens are items alone: set tokens to merged or interleaved")
        check_transducers(self)

    def as_dict(self) -> dict[str, Any]:
        """Every field, as stored in a manifest."""
        return asdict(self)

    @property
    def reads_actions(self) -> bool:
        """Whether what was done with items decides what the encoder computes."""
        return self.plan().reads_actions or bool(self.transducers)

    def config_hash(self) -> str:
        """sha256 in hex: equal only for models whose weights are interchangeable."""
        return hashlib.sha256(json.dumps(self.hashed_fields(), sort_keys=True).encode()).hexdigest()

    def hashed_fields(self) -> dict[str, Any]:
        """What decides which weights fit.

        Every field but max_items and recompute, which say how it is computed and kept, not what it is; of those that
        make a plan, what they come to.
        """
        fields = {name: value for name, value in self.as_dict().items() if name not in _NOT_IN_HASH}
        plan = self.plan()
        fields |= {"relative_bias": plan.has_relative_bias} | plan.identity()
        if plan.reads_actions and self.value_thresholds:
            fields["value_thresholds"] = list(self.value_thresholds)
        if self.surfaces:
            fields["surfaces"] = True
        if self.transducers:
            parts = [(one.mask, part_config(self, one)) for one in self.transducers]
            fields["transducers"] = [[mask, own.max_len, own.num_layers, own.plan().identity()] for mask, own in parts]
        return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """How the next item is supervised."""

    kind: Literal["full", "sampled"] = "full"
    """full: softmax over the live catalogue. sampled: over the targets and shared negatives, for large catalogues."""
    num_hard_negatives: int = 512
    """Rows outside the batch that a step of the full softmax corrects: those given the most probability. The loss
    and every other gradient are over all rows; the rows left alone keep a delta small, and rank no worse."""
    num_negatives: int = 2048
    """Negatives drawn for a step and shared by its positions; used by the sampled loss only."""
    negatives: Literal["uniform", "popularity", "in_batch"] = "uniform"
    """How the sampled loss draws them from the live catalogue. uniform: every item alike. popularity: by decayed
    popularity to the power of negatives_power. in_batch: not at all. In every case the targets of the other positions
    are negatives, too, and each candidate is corrected by its log chance to be one."""
    negatives_power: float = 0.75
    """Exponent of the decayed popularity by which `popularity` draws; 0 is uniform."""
    positions_per_chunk: int = 256
    """Positions whose logits over the whole catalogue exist at once; bounds memory."""
    stochastic_length_alpha: float = 0.0
    """Read long histories in part while training, so that attention costs max_len to this power per user: above 1, at
    most 2; 0: read them whole. Serving always does. The test before each step is made on the same shortened
    histories, so prequential metrics then understate what is served."""
    stochastic_length_selection: Literal["recent", "feature_weighted", "uniform"] = "feature_weighted"
    """Which interactions a shortened history keeps besides those learned from. recent: the newest. uniform: any.
    feature_weighted: any, the oldest with less weight."""
    stochastic_length_balance: bool = False
    """Choose which long histories are read whole so that every step costs alike, each as often as without. Steps then
    take more even time and memory; on average they cost the same."""
    stochastic_length_pair_cost: float = 0.0
    """For that: what one pair of positions costs in attention, in units of what one position costs elsewhere in a
    layer. 0: by floating-point operations. Measure it where attention is slower or faster than those say."""
    action_weights: dict[str, float] = field(default_factory=dict)
    """How much an interaction counts as something to predict, by its action: {purchase = 3.0, view = 0.0}. 0: it is
    read in histories, but neither learned from nor measured. Actions that are not named count 1; one interaction with
    several actions counts as the weightiest."""

    def __post_init__(self) -> None:
        _require_one_of(self, "kind", ("full", "sampled"))
        _require_one_of(self, "negatives", ("uniform", "popularity", "in_batch"))
        _require(self, "negatives_power", 0.0, 2.0)
        alpha = self.stochastic_length_alpha
        if alpha != 0 and not 1 < alpha <= 2:
            raise ValueError(f"stochastic_length_alpha is {alpha}; it must be 0 (off) or above 1 and at most 2")
        _require_one_of(self, "stochastic_length_selection", ("recent", "feature_weighted", "uniform"))
        if self.stochastic_length_balance and not alpha:
            raise ValueError(
                "stochastic_length_balance is set and stochastic_length_alpha is 0: nothing is shortened that could be"
                " balanced; set stochastic_length_alpha above 1 too"
            )
        _require(self, "stochastic_length_pair_cost", 0.0, 1e6)
        _require(self, "num_hard_negatives", 0, 1 << 31)
        _require(self, "num_negatives", 1, 1 << 24)
        _require(self, "positions_per_chunk", 1, 1 << 20)
        for action, weight in self.action_weights.items():
            if not 0 <= weight <= 1_000:
                raise ValueError(f"action_weights gives {action!r} {weight}; it must be between 0 and 1000")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW for the dense parameters, row-wise AdamW or Adagrad for items."""

    dense_learning_rate: float = 1e-3
    """Step size of the dense parameters."""
    row_learning_rate: float = 1e-2
    """Step size of item embeddings and biases; ten times the dense one, since a row is touched rarely."""
    dense_weight_decay: float = 0.0
    """Decoupled decay of the dense parameters per step, times the learning rate."""
    row_weight_decay: float = 0.0
    """Decoupled decay of touched item embeddings (never biases) per step, times the learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment; the research code's, shorter than usual so that it follows a changing stream."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    row_optimizer: Literal["adamw", "adagrad"] = "adamw"
    """How item rows are stepped. adamw: moments decay with a row's own steps. adagrad: one number a row and one a bias
    instead of width + 4, steps only ever get smaller. A change starts its moments anew."""
    warm_up_steps: int = 0
    """Steps over which learning rates rise from 0; with inverse_sqrt also the step from which on they fall."""
    schedule: Literal["constant", "inverse_sqrt"] = "constant"
    """Learning rates after that. inverse_sqrt: fall with the root of the steps done, to schedule_floor."""
    schedule_floor: float = 0.1
    """Share of the learning rates that inverse_sqrt does not go below, so that learning never ends."""
    max_gradient_norm: float = 0.0
    """Gradients of a step, dense and rows together, are scaled down to this norm; 0: never."""

    def __post_init__(self) -> None:
        _require_one_of(self, "row_optimizer", ("adamw", "adagrad"))
        _require_one_of(self, "schedule", ("constant", "inverse_sqrt"))
        _require(self, "warm_up_steps", 0, 1 << 40)
        _require(self, "schedule_floor", 0.0, 1.0)
        _require(self, "max_gradient_norm", 0.0, 1e9)
        for name in ("dense_learning_rate", "row_learning_rate", "dense_weight_decay", "row_weight_decay"):
            _require(self, name, 0.0, 10.0)
        for name in ("beta1", "beta2"):
            _require(self, name, 0.0, 0.999999)
        _require(self, "epsilon", 1e-30, 1.0)


def _require(config: object, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be between {low} and {high}: change {name} in the settings")


def _require_one_of(config: object, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be {' or '.join(allowed)}: change {name} in the settings")
