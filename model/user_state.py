"""User states: what the encoder computed of a history, kept so that only what is new is computed the next time.

A position of a history is *settled* once the next interaction is known: all that its keys and values depend on (the
items and times up to it, and when it was followed) is then final. The newest position sees the time of the request, so
it is computed for every request; so are positions behind the first difference to what was kept.

What is kept says what it was computed from, and is used only where that is the same: a late event, a moved window or a
forgotten user cannot be mistaken for the history that was kept. The weights are the caller's to compare.

Shapes: B users, L packed positions, M of them computed now, P settled positions of one user, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kernels.implementations import KernelName
from model.batch import HistoryBatch
from model.config import ModelConfig
from model.hstu import HSTU
from model.initial import NORM_EPS
from model.key_values import KeyValues
from model.recommender import Recommender, take_items

Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class UserState:
    """Keys and values of the P settled positions of one history, and what they were computed from.

    inputs_3P: int64[3, P], item row, time and query time of each position. layers: float[layers, P, W].
    """

    inputs_3P: Int64s
    layers: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.inputs_3P.nbytes + self.layers.nbytes

    def num_reusable(self, inputs_3n: Int64s) -> int:
        """Leading positions that are settled in a history with these inputs, and were computed from the same."""
        settled = min(self.inputs_3P.shape[1], inputs_3n.shape[1] - 1)
        differs = (self.inputs_3P[:, :settled] != inputs_3n[:, :settled]).any(axis=0)
        return int(differs.argmax()) if differs.any() else settled


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedUsers:
    """u_BD: the newest state of each user, of unit length. states: what to keep of each. num_reused_B: positions
    that were not computed.
    """

    u_BD: Tensor
    states: list[UserState]
    num_reused_B: list[int]


def keeps_user_states(config: ModelConfig) -> bool:
    """Whether states stay valid from one request to the next: not where every position sees when the history ends."""
    return config.kind == "hstu" and config.attention_activation == "silu" and not config.time_embedding


def window_len(num_interactions: int, *, max_len: int, hop: int) -> int:
    """How many of a user's newest interactions the model reads.

    All up to max_len. Beyond it the oldest leave ``hop`` at a time, not one by one: every place counts from the oldest,
    so each move makes all that was kept useless. Between max_len - hop + 1 and max_len then, a function of the number
    of interactions alone: the same whatever was kept. hop: 1 to max_len.
    """
    beyond = max(0, num_interactions - max_len)
    return num_interactions - -(-beyond // hop) * hop


@torch.no_grad()
def encode_newest(
    recommender: Recommender,
    batch: HistoryBatch,
    known: Sequence[UserState | None],
    *,
    kernel: KernelName = "auto",
) -> EncodedUsers:
    """The newest state of each of B users, none without interactions, from what is known of them and what is new.

    known: of each user, what an earlier call with the same weights and item rows returned, or None. Equal to
    ``Recommender.encode`` at ``batch.last_positions()``, up to rounding. ValueError unless ``keeps_user_states``.
    """
    if not keeps_user_states(recommender.config):
        raise ValueError("this encoder's states change with the time of the request (model.time_embedding, kind)")
    inputs_3L = torch.stack([batch.rows_L, batch.timestamps_ms_L, batch.query_times_ms_L]).numpy()
    bounds = batch.offsets.tolist()
    inputs = [inputs_3L[:, start:end] for start, end in pairwise(bounds)]
    reused = [0 if one is None else one.num_reusable(own) for one, own in zip(known, inputs, strict=True)]
    u_BD = torch.empty(len(inputs), recommender.config.embedding_dim)
    states: list[UserState | None] = [None] * len(inputs)
    # Rows that are all new are computed apart: attention is faster where every position has a query.
    for has_known in (False, True):
        users = [user for user, count in enumerate(reused) if (count > 0) == has_known]
        if users:
            part = [_User(known[user], reused[user], inputs[user]) for user in users]
            u_BD[torch.tensor(users)], found = _encode(recommender, part, kernel)
            for user, state in zip(users, found, strict=True):
                states[user] = state
    return EncodedUsers(u_BD=u_BD, states=[state for state in states if state is not None], num_reused_B=reused)


@dataclass(frozen=True, slots=True)
class _User:
    known: UserState | None
    num_reused: int
    inputs_3n: Int64s


def _encode(recommender: Recommender, users: Sequence[_User], kernel: KernelName) -> tuple[Tensor, list[UserState]]:
    """u_BD and states of users of whom nothing is reused, or something of each."""
    kept = _key_values(recommender.config, users)
    rows_L, times_L, query_times_L = torch.from_numpy(np.concatenate([user.inputs_3n for user in users], axis=1))
    rows_M = rows_L[kept.new_M]
    encoder = recommender.encoder
    assert isinstance(encoder, HSTU), "checked by keeps_user_states"
    x_MD = encoder.extended_states(
        take_items(recommender.items.weight, rows_M.clamp(min=0)),
        rows_M >= 0,
        (times_L, query_times_L[kept.new_M]),
        kept,
        kernel=kernel,
    )
    u_BD = functional.normalize(x_MD[_num_new(users).cumsum(0) - 1], dim=1, eps=NORM_EPS)
    starts = kept.offsets.tolist()
    return u_BD, [_settled(user, kept.layers[:, start:]) for user, start in zip(users, starts, strict=False)]


def _num_new(users: Sequence[_User]) -> Tensor:
    return torch.tensor([user.inputs_3n.shape[1] - user.num_reused for user in users])


def _key_values(config: ModelConfig, users: Sequence[_User]) -> KeyValues:
    """Room for the keys and values of all positions, what is known already in place."""
    lengths_B, num_new_B = torch.tensor([user.inputs_3n.shape[1] for user in users]), _num_new(users)
    zero = torch.zeros(1, dtype=torch.int64)
    offsets = torch.cat([zero, lengths_B.cumsum(0)])
    num_positions = int(offsets[-1])
    layers = torch.empty(config.num_layers, num_positions, KeyValues.width(config))
    is_new_L = torch.ones(num_positions, dtype=torch.bool)
    for user, start in zip(users, offsets.tolist(), strict=False):
        if user.known is not None and user.num_reused:
            layers[:, start : start + user.num_reused] = user.known.layers[:, : user.num_reused]
            is_new_L[start : start + user.num_reused] = False
    new_M = is_new_L.nonzero().flatten()
    return KeyValues(
        layers=layers,
        offsets=offsets,
        query_offsets=None if len(new_M) == num_positions else torch.cat([zero, num_new_B.cumsum(0)]),
        new_M=new_M,
        places_M=new_M - torch.repeat_interleave(offsets[:-1], num_new_B),
    )


def _settled(user: _User, layers: Tensor) -> UserState:
    """What to keep of a user: all positions but the newest. layers: from the user's first position on."""
    num_settled = user.inputs_3n.shape[1] - 1
    if user.known is not None and user.num_reused == num_settled == user.known.inputs_3P.shape[1]:
        return user.known
    # Copies: a view would keep the memory of the whole batch.
    return UserState(inputs_3P=user.inputs_3n[:, :num_settled].copy(), layers=layers[:, :num_settled].clone())
