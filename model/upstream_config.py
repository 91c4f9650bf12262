"""What the user model upstream of the ranker is. Without torch: commands read settings that compute nothing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig
from model.llatte_config import LlatteConfig, Trimming

if TYPE_CHECKING:
    from model.action_heads import ActionTask


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamConfig:
    """The upstream user model: long histories to one vector a user, which the ranker reads (LLaTTE)."""

    width: int = 256
    """Numbers in a user's vector (the paper: 2048). The ranker is built for one width."""
    embedding_dim: int = 64
    """Width of the upstream model's own item embeddings and of its tokens."""
    content: bool = False
    """What the topic `items` says about items is part of their tokens in histories, and tells where embeddings of new
    ones start: as of the time when a version is released. Needs items.content_items above 0. Changing it needs a new
    upstream model."""
    num_layers: int = 4
    """Layers over the history."""
    num_heads: int = 4
    """Attention heads of a layer; all read the same latent keys."""
    latent_dim: int = 32
    """Width of those keys."""
    head_dim: int = 32
    """Width of a head, were its projections not absorbed."""
    ffn_dim: int = 128
    """Width inside the feed-forward part of a layer."""
    num_queries: int = 8
    """Query tokens behind the history, whose outputs become the vector."""
    readout_rank: int = 64
    """Narrow middle of the map from the query tokens to the vector."""
    max_len: int = 1024
    """Newest interactions of a history that are read (the paper: up to 5000)."""
    trimming: Trimming = "full"
    """What layers still compute. full: every interaction. pyramid: half as many, the newest, from layer to layer.
    cross_attention: the query tokens alone. The last layer computes query tokens alone in any case."""
    next_item_weight: float = 1.0
    """Weight of predicting the item that comes next from the vector, beside the tasks of [ranking]; 0: not at all."""
    num_negatives: int = 512
    """Items drawn for a step that the next one is told from, besides those of the step itself."""
    temperature: float = 0.1
    """Cosines of vector and item start out divided by this; the scale is learned from there."""
    task_hidden_dim: int = 64
    """Width of the hidden layer between the vector, an item, and what is predicted about the two."""
    max_items: int = 4_000_000
    """Items with a row at most; for new ones those of the lowest popularity make room (items.retired_share)."""
    item_init_std: float = 0.02
    """Standard deviation of a new item's embedding, around the mean of those that came last."""
    seed: int = 0
    """Seed of all initial weights."""

    def __post_init__(self) -> None:
        for name in ("width", "embedding_dim", "readout_rank", "num_negatives", "task_hidden_dim"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                raise ValueError(f"upstream.{name} = {getattr(self, name)}: must be between 1 and {1 << 20}")
        if not 0 <= self.next_item_weight <= 1_000:
            raise ValueError(f"upstream.next_item_weight = {self.next_item_weight}: must be between 0 and 1000")
        if not 0.001 <= self.temperature <= 100:
            raise ValueError(f"upstream.temperature = {self.temperature}: must be between 0.001 and 100")
        try:
            self.network()
            self.items()
        except ValueError as error:
            raise ValueError(f"upstream.{error}") from error

    def network(self) -> LlatteConfig:
        """The layers."""
        return LlatteConfig(
            width=self.embedding_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            latent_dim=self.latent_dim,
            head_dim=self.head_dim,
            ffn_dim=self.ffn_dim,
            num_queries=self.num_queries,
            max_len=self.max_len,
            trimming=self.trimming,
        )

    def items(self) -> ModelConfig:
        """What the item table goes by."""
        return ModelConfig(
            embedding_dim=self.embedding_dim,
            max_items=self.max_items,
            item_init_std=self.item_init_std,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamModelConfig:
    """The settings, and what there is to read of interactions and to predict."""

    upstream: UpstreamConfig
    """What a person sets."""
    tasks: tuple[ActionTask, ...]
    """What is predicted about a user and an item, as by the ranker."""
    num_actions: int
    """Kinds of action in a history; kind k is bit k of an interaction's actions."""
    value_thresholds: tuple[float, ...] = ()
    """Thresholds of an interaction's value that its token tells apart."""
    surfaces: bool = False
    """Whether where an interaction happened is part of its token."""

    def as_dict(self) -> dict[str, Any]:
        """Every field, as stored in a manifest."""
        return asdict(self)

    def config_hash(self) -> str:
        """sha256 in hex of every field that weights depend on: not max_items, nor how much a loss counts."""
        tasks = [asdict(replace(task, weight=1.0)) for task in self.tasks]
        others = {"max_items", "next_item_weight", "num_negatives"}
        if not self.upstream.content:
            others.add("content")  # weights from before there was this setting stay what they are
        upstream = {name: value for name, value in asdict(self.upstream).items() if name not in others}
        content = {**self.as_dict(), "upstream": upstream, "tasks": tasks}
        if not self.surfaces:
            del content["surfaces"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
