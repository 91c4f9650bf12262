"""What an encoder reads of a history, and how much of it each layer sees: settings that ``kind`` may decide, decided.

Without torch: commands read settings that compute nothing. All lengths count interactions; two tokens of one
interaction are counted together (``EncoderPlan.in_tokens``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from model.transducers import hop_start

Tokens = Literal["items", "merged", "interleaved"]
Attention = Literal["full", "semi_local"]
GlobalAttention = Literal["newest_queries", "oldest_keys"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderPlan:
    """The encoder of ULTRA-HSTU (arXiv 2602.16986) with each of its parts on or off; all off: HSTU's."""

    tokens: Tokens
    has_relative_bias: bool
    local_len: int | None
    """Places before its own that a query sees (K1); None: all of them."""
    global_len: int
    """K2; 0 where all is seen anyway."""
    global_attn: GlobalAttention
    num_truncated: int
    """How many of the last layers read only the newest of a history; 0 where no history is longer than they read."""
    truncated_len: int
    """What they read at most."""
    truncated_hop: int
    """How far what they read moves at a time."""

    @property
    def reads_actions(self) -> bool:
        """Whether what was done with an item is part of the input."""
        return self.tokens != "items"

    @property
    def tokens_per_interaction(self) -> int:
        """1 or 2."""
        return 2 if self.tokens == "interleaved" else 1

    @property
    def num_unsettled(self) -> int:
        """Newest interactions whose keys and values change when another comes: at least the newest itself, which sees
        the time of the request. Those that are let off the limit for being new have to keep it later.
        """
        return max(1, self.global_len) if self.global_attn == "newest_queries" else 1

    def truncated_start(self, num_interactions: int) -> int:
        """The first interaction that truncated layers read of so many: 0 up to truncated_len, then in hops."""
        return hop_start(num_interactions, self.truncated_len, self.truncated_hop)

    def in_tokens(self, num_targets_max: int = 0) -> dict[str, Any]:
        """The settings of an encoder over tokens, of which a row ends with at most so many targets."""
        each = self.tokens_per_interaction
        found: dict[str, Any] = {
            "tokens": "items",
            "transducers": (),
            "value_thresholds": (),
            "surfaces": False,
            "relative_bias": self.has_relative_bias,
            "attention": "full",
            "truncated_layers": 0,
            "truncated_len": None,
            "truncated_hop": None,
        }
        if self.local_len is not None:
            found |= {
                "attention": "semi_local",
                "local_attn_len": each * self.local_len,
                "global_attn_len": each * self.global_len,
            }
        if self.num_truncated:
            found |= {
                "truncated_layers": self.num_truncated,
                "truncated_len": each * self.truncated_len + num_targets_max,
                "truncated_hop": each * self.truncated_hop,
            }
        return found

    def identity(self) -> dict[str, Any]:
        """What decides which weights fit, without what is off: a model that uses none of it has the hash it had."""
        found: dict[str, Any] = {} if self.tokens == "items" else {"tokens": self.tokens}
        if self.local_len is not None:
            found["semi_local"] = [self.local_len, self.global_len, self.global_attn]
        if self.num_truncated:
            found["truncated"] = [self.num_truncated, self.truncated_len, self.truncated_hop]
        return found
