"""Which keys a query sees: the mask family of HSTU and ULTRA-HSTU.

Every position of a row has a *place*. Without contextual positions and targets it is the index in the row. The
contextual positions at a row's start all stand at place 0, and the targets at its end all at the place behind the
history, so that the order of neither means anything. The relative bias counts its distances in places, too.

Shapes: B rows, G rows of a group, n positions of its longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMask:
    """A query sees itself and every key at an earlier place, limited and widened by the fields.

    num_targets_B: int64[B], positions at the end of each row that are targets (candidates): they see the history and
    themselves, never each other. None: no row has any.
    contextual_len: positions at the start of every row that describe the user: they see everything but the targets.
    max_attn_len: places before its own that a query sees (semi-local attention's K1), None for no limit. 0: no window,
    a query sees itself and what the next two fields add.
    min_full_attn_len: newest places of the history whose queries look back without limit, and with them the targets
    (K2 as the published code reads it). Used with max_attn_len.
    num_oldest_keys: first positions of each row that every later query sees, the limit notwithstanding (K2 in the
    other reading of the paper). Used with max_attn_len.
    With a limit, contextual keys are seen only within it, unless num_oldest_keys covers them.
    """

    num_targets_B: Tensor | None = None
    contextual_len: int = 0
    max_attn_len: int | None = None
    min_full_attn_len: int = 0
    num_oldest_keys: int = 0

    def __post_init__(self) -> None:
        for name in ("contextual_len", "max_attn_len", "min_full_attn_len", "num_oldest_keys"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more positions")
        if self.max_attn_len is None and (self.min_full_attn_len or self.num_oldest_keys):
            raise ValueError("min_full_attn_len and num_oldest_keys widen a window: set max_attn_len, or leave them 0")
        targets = self.num_targets_B
        if targets is not None and (targets.dtype != torch.int64 or targets.dim() != 1):
            raise ValueError(f"num_targets_B must be int64[B], got {targets.dtype} of shape {tuple(targets.shape)}")

    @property
    def is_causal_only(self) -> bool:
        """Nothing but the triangle: the places are the indices, in every row alike."""
        return self.num_targets_B is None and self.contextual_len == 0 and self.max_attn_len is None

    @property
    def limit(self) -> int:
        """max_attn_len as compiled code takes it: -1 for no limit."""
        return -1 if self.max_attn_len is None else self.max_attn_len

    def checked(self, offsets: Tensor) -> AttentionMask:
        """Return self after comparing with the rows (synchronises the device).

        ValueError if a row that is not empty is shorter than its targets and the contextual positions.
        """
        lengths_B = offsets.diff()
        targets_B = torch.zeros_like(lengths_B) if self.num_targets_B is None else self.num_targets_B
        if targets_B.numel() and int(targets_B.min()) < 0:
            raise ValueError("num_targets_B has a negative entry; it must be 0 or more positions in each row")
        short_B = (lengths_B > 0) & (lengths_B < targets_B + self.contextual_len)
        if bool(short_B.any()):
            row = int(short_B.nonzero()[0])
            raise ValueError(
                f"row {row} has {int(lengths_B[row])} positions; its targets (num_targets_B) and contextual_len need"
                f" {int(targets_B[row]) + self.contextual_len}"
            )
        return self

    def num_targets_in(self, lengths_B: Tensor) -> Tensor:
        """int64, shape of lengths_B: targets of each row."""
        return torch.zeros_like(lengths_B) if self.num_targets_B is None else self.num_targets_B

    def num_pairs(self, lengths_B: Tensor, num_queries_B: Tensor) -> Tensor:
        """int64[B]: about how many pairs of a query and a key it sees each row has; what its attention costs.

        num_queries_B: how many of a row's last positions have a query. Exact for the triangle.
        """
        cached_B = lengths_B - num_queries_B
        causal_B = num_queries_B * (lengths_B + cached_B + 1) // 2
        contextual_B = (self.contextual_len - cached_B).clamp(min=0) * lengths_B
        if self.max_attn_len is None:
            return causal_B + contextual_B
        unlimited_B = self.num_targets_in(lengths_B) + self.min_full_attn_len if self.min_full_attn_len else 0
        limited_B = num_queries_B * (self.max_attn_len + 1 + self.num_oldest_keys) + lengths_B * unlimited_B
        return torch.minimum(causal_B, limited_B) + contextual_B

    def history_end(self, lengths_G: Tensor, num_targets_G: Tensor) -> Tensor:
        """int64[G]: the place behind the history, where the targets stand."""
        return lengths_G - num_targets_G - max(self.contextual_len - 1, 0)

    def places(self, index_Gn: Tensor, history_end_G: Tensor) -> Tensor:
        """int64[G, n]: the place of each index of a row."""
        shifted_Gn = (index_Gn - max(self.contextual_len - 1, 0)).clamp_(min=0)
        return torch.minimum(shifted_Gn, history_end_G[:, None])

    def visible(self, query_index_Gm: Tensor, key_index_Gn: Tensor, lengths_G: Tensor, num_targets_G: Tensor) -> Tensor:
        """bool[G, m, n]: which key indices each query index of a row sees.

        Indices behind the row's end are seen by nothing but themselves.
        """
        end_G = self.history_end(lengths_G, num_targets_G)
        query_Gm1 = self.places(query_index_Gm, end_G)[:, :, None]
        key_G1n = self.places(key_index_Gn, end_G)[:, None, :]
        distance_Gmn = query_Gm1 - key_G1n
        visible_Gmn = distance_Gmn > 0
        if self.max_attn_len is not None:
            near_Gmn = distance_Gmn <= self.max_attn_len
            if self.min_full_attn_len:
                near_Gmn = near_Gmn | (query_Gm1 >= end_G[:, None, None] - self.min_full_attn_len)
            if self.num_oldest_keys:
                near_Gmn = near_Gmn | (key_index_Gn[:, None, :] < self.num_oldest_keys)
            visible_Gmn = visible_Gmn & near_Gmn
        if self.contextual_len:
            visible_Gmn = visible_Gmn | ((query_Gm1 == 0) & (key_G1n < end_G[:, None, None]))
        return visible_Gmn | (query_index_Gm[:, :, None] == key_index_Gn[:, None, :])


CAUSAL = AttentionMask()
"""The plain triangle."""
