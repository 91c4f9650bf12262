"""What a LLaTTE sequence module is made of. Without torch: commands read settings that compute nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

Trimming = Literal["full", "pyramid", "cross_attention"]
_COUNTS: Final = ("width", "num_layers", "num_heads", "latent_dim", "head_dim", "ffn_dim", "num_queries", "max_len")


@dataclass(frozen=True, kw_only=True, slots=True)
class LlatteConfig:
    """A stack of layers over action tokens with query tokens behind them (LLaTTE, arXiv 2601.20083)."""

    width: int
    """Width of tokens."""
    num_layers: int
    """Layers."""
    num_heads: int
    """Attention heads of a layer; all read the same latent keys."""
    latent_dim: int
    """Width of the latent keys and of the latent that queries come from."""
    head_dim: int
    """Width of a head's keys and values, were they not absorbed: scores are divided by its root."""
    ffn_dim: int
    """Width inside the feed-forward part."""
    num_queries: int
    """Query tokens that every row has."""
    max_len: int
    """Newest interactions of a history that are read."""
    trimming: Trimming = "pyramid"
    """What layers still compute: see ``kept_lens``."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if not 1 <= getattr(self, name) <= 1 << 20:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 1 and {1 << 20}")
        if self.trimming not in get_args(Trimming):
            raise ValueError(f"trimming is {self.trimming!r}; it must be {' or '.join(get_args(Trimming))}")

    def kept_lens(self) -> tuple[int, ...]:
        """Newest interactions that each layer computes, besides query tokens; it reads those of the layer before.

        full: all. pyramid: half as many from layer to layer. cross_attention: none, so that only the first layer reads
        the history. The last layer computes query tokens alone in any case: nothing else is read out.
        """
        inner = range(1, self.num_layers)
        if self.trimming == "full":
            kept = [self.max_len for _ in inner]
        elif self.trimming == "pyramid":
            kept = [max(self.max_len >> layer, 1) for layer in inner]
        else:
            kept = [0 for _ in inner]
        return (*kept, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LlatteSettings:
    """The online ranker of LLaTTE, where `ranking.kind` is "llatte"; tokens are as wide as `model.embedding_dim`, and
    `model.max_len` interactions are read.
    """

    num_layers: int = 2
    """Layers over history, query tokens and candidates."""
    num_heads: int = 4
    """Attention heads of a layer; all read the same latent keys."""
    latent_dim: int = 32
    """Width of those keys."""
    head_dim: int = 32
    """Width of a head, were its projections not absorbed."""
    ffn_dim: int = 128
    """Width inside the feed-forward part of a layer."""
    num_queries: int = 2
    """Query tokens of the request, besides the one of the user's vector and each candidate's own."""
    trimming: Trimming = "pyramid"
    """What layers still compute. full: every interaction. pyramid: half as many, the newest, from layer to layer.
    cross_attention: only what is not history. The last layer leaves the history out in any case."""
    readout_rank: int = 32
    """Narrow middle of the map from query tokens to the summary of the sequence."""
    sequence_dim: int = 32
    """Width of that summary."""
    backbone_dim: int = 64
    """Width of the layers that join candidate, user, request and sequence."""
    backbone_layers: int = 2
    """How many they are."""
    content: bool = False
    """Read what the topic `items` says about items (embedding or text, and categories) as part of their tokens. Needs
    items.content_items above 0, and makes every row of a snapshot 128 bytes longer. Changing it needs a new model."""
    upstream_dropout: float = 0.1
    """Share of what is learned from, from which the user's vector is withheld: the ranker learns to do without, for the
    users who have none and for hours when nobody makes them."""

    def __post_init__(self) -> None:
        for name in ("readout_rank", "sequence_dim", "backbone_dim", "backbone_layers"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                raise ValueError(f"llatte.{name} = {getattr(self, name)}: must be between 1 and {1 << 20}")
        if not 0 <= self.upstream_dropout < 1:
            raise ValueError(f"llatte.upstream_dropout = {self.upstream_dropout}: must be a share from 0 to below 1")
        try:
            self.network(width=1, max_len=1)
        except ValueError as error:
            raise ValueError(f"llatte.{error}") from error

    def network(self, *, width: int, max_len: int) -> LlatteConfig:
        """The layers, over tokens of this width and histories of this length."""
        return LlatteConfig(
            width=width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            latent_dim=self.latent_dim,
            head_dim=self.head_dim,
            ffn_dim=self.ffn_dim,
            num_queries=self.num_queries,
            max_len=max_len,
            trimming=self.trimming,
        )
