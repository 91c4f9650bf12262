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
