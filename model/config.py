"""Settings of the model, its loss and its optimiser."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

DeviceChoice = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What the model is. Two models exchange weights only if all of this but max_items is equal (``config_hash``)."""

    kind: Literal["hstu", "sasrec", "gru"] = "hstu"
    """Encoder of histories. hstu: pointwise attention. To compare with: sasrec, a softmax Transformer, and gru, a
    recurrent net."""
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
    relative_bias: bool = True
    """Add a learned number per distance and per bucket of the time gap to every attention score. Sees when the
    request happens, so that a cached history stays valid for the next one."""
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
        _require_one_of(self, "kind", ("hstu", "sasrec", "gru"))
        _require_one_of(self, "attention_activation", ("silu", "softmax"))
        if self.attention_activation == "softmax" and self.relative_bias:
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

    def as_dict(self) -> dict[str, Any]:
        """Every field, as stored in a manifest."""
        return asdict(self)

    def config_hash(self) -> str:
        """sha256 in hex of every field but max_items: equal only for models whose weights are interchangeable."""
        fields = {name: value for name, value in self.as_dict().items() if name != "max_items"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


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
