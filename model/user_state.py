"""User states: what the encoder computed of a history, kept so that only what is new is computed the next time.

A position of a history is *settled* once the next interaction is known: all that its keys and values depend on (the
items and times up to it, and when it was followed) is then final. The newest position sees the time of the request, so
it is computed for every request; so are positions behind the first difference to what was kept, and those that see more
for being among the newest (``EncoderPlan.num_unsettled``).

What is kept says what it was computed from, and is used only where that is the same: a late event, a moved window or a
forgotten user cannot be mistaken for the history that was kept. The weights are the caller's to compare.

Shapes: B users, L packed positions, M of them computed now, P settled positions of one user, D width, W window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kernels.implementations import KernelName
from model.batch import HistoryBatch
from model.config import ModelConfig
from model.encoder_plan import EncoderPlan
from model.hstu import HSTU
from model.initial import NORM_EPS
from model.key_values import KeyValues, NewestStates, packed_places
from model.mixture import TransducerMixture
from model.recommender import Recommender, take_items
from model.token_hstu import Acts, TokenHSTU
from model.transducers import read_by
from model.user_decoding import decode_newest, decodes

Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class UserState:
    """Keys and values of the P settled positions of one history, and what they were computed from.

    inputs_IP: int64[I, P], all that keys and values of a position depend on besides the positions before it: item row,
    time and query time, and, where they are read, its actions and the bits of its value. layers: float[layers, P, W],
    of the layers that read all of the history. newest: of those that read the newest of it, where there are any. Two
    tokens of one position stand side by side.
    """

    inputs_IP: Int64s
    layers: Tensor
    newest: NewestState | None = None

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        of_newest = 0 if self.newest is None else self.newest.states_ND.nbytes + self.newest.layers.nbytes
        return self.inputs_IP.nbytes + self.layers.nbytes + of_newest

    def num_reusable(self, inputs_In: Int64s, plan: EncoderPlan) -> int:
        """Leading positions that are settled in a history with these inputs, and were computed from the same."""
        num_interactions = inputs_In.shape[1]
        settled = max(0, min(self.inputs_IP.shape[1], num_interactions - plan.num_unsettled))
        if self.newest is not None and (start := plan.truncated_start(num_interactions)) < self.newest.start:
            settled = min(settled, start)  # what the truncated layers are given is kept from a later one on only
        differs = (self.inputs_IP[:, :settled] != inputs_In[:, :settled]).any(axis=0)
        return int(differs.argmax()) if differs.any() else settled


@dataclass(frozen=True, kw_only=True, slots=True)
class NewestState:
    """What truncated layers read of settled positions, from ``start`` on, N of them, and their keys and values.

    states_ND: float[N, D]. layers: float[layers, N, W]; valid while the truncated layers read from start on.
    """

    start: int
    states_ND: Tensor
    layers: Tensor


@dataclass(frozen=True, slots=True)
class MixedState:
    """Of a mixture: what each transducer keeps of a user; None of one that has read nothing of them."""

    parts: tuple[UserState | None, ...]

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return sum(part.num_bytes for part in self.parts if part is not None)


KeptState = UserState | MixedState


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedUsers:
    """u_BD: the newest state of each user, of unit length. states: what to keep of each. num_reused_B, num_computed_B:
    positions that were not computed, and that were; of a mixture, of all its transducers together.
    """

    u_BD: Tensor
    states: Sequence[KeptState]
    num_reused_B: list[int]
    num_computed_B: list[int]


def keeps_user_states(config: ModelConfig) -> bool:
    """Whether states stay valid from one request to the next: not where every position sees when the history ends."""
    is_hstu = config.kind in ("hstu", "ultra_hstu")
    return is_hstu and config.attention_activation == "silu" and not config.time_embedding


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
    known: Sequence[KeptState | None],
    *,
    kernel: KernelName = "auto",
) -> EncodedUsers:
    """``encode_users`` of a batch. Equal to ``Recommender.encode`` at ``batch.last_positions()``, up to rounding."""
    columns = [batch.rows_L, batch.timestamps_ms_L, batch.query_times_ms_L]
    if recommender.config.reads_actions:
        acts = recommender.acts_of(batch)
        columns += [acts.actions_L, acts.values_L.view(torch.int32).long()]
    inputs_IL = torch.stack(columns).numpy()
    inputs = [inputs_IL[:, start:end] for start, end in pairwise(batch.offsets.tolist())]
    return encode_users(recommender, inputs, known, kernel=kernel)


def user_inputs(
    config: ModelConfig,
    rows: Int64s,
    times_ms: Int64s,
    asked_ms: int,
    acts: Int64s,
    values: NDArray[np.float32],
) -> Int64s:
    """int64[I, n]: what ``encode_users`` takes of one history, oldest first, when its user asks at asked_ms.

    rows: int64[n], -1 for items that the table does not hold. acts: a bit each, and where
    (``ActionEncoder``). values: NaN where unknown.
    """
    inputs_In = np.empty((5 if config.reads_actions else 3, len(rows)), np.int64)
    inputs_In[0], inputs_In[1], inputs_In[2, :-1] = rows, times_ms, times_ms[1:]
    # A producer's clock may run ahead of ours: the request still comes after everything it knows of.
    inputs_In[2, -1:] = np.maximum(times_ms[-1:], asked_ms)
    if config.reads_actions:
        inputs_In[3], inputs_In[4] = acts, values.view(np.int32)
    return inputs_In


def encode_users(
    recommender: Recommender,
    inputs: Sequence[Int64s],
    known: Sequence[KeptState | None],
    *,
    kernel: KernelName = "auto",
) -> EncodedUsers:
    """The newest state of each of B users, none without interactions, from what is known of them and what is new.

    inputs: ``user_inputs`` of each. known: of each user, what an earlier call with the same weights and item rows
    returned, or None. ValueError unless ``keeps_user_states``.
    """
    if not keeps_user_states(recommender.config):
        raise ValueError("this encoder's states change with the time of the request (model.time_embedding, kind)")
    encoder = recommender.encoder
    if isinstance(encoder, TransducerMixture):
        return _encode_mixed(recommender, encoder, inputs, known, kernel)
    assert isinstance(encoder, HSTU | TokenHSTU), "checked by keeps_user_states"
    return _encode_rows(recommender, encoder, inputs, [_of_one(one) for one in known], kernel)


def _of_one(known: KeptState | None) -> UserState | None:
    assert not isinstance(known, MixedState), "kept under the same weights"
    return known


def _encode_mixed(
    recommender: Recommender,
    mixture: TransducerMixture,
    inputs: Sequence[Int64s],
    known: Sequence[KeptState | None],
    kernel: KernelName,
) -> EncodedUsers:
    """Every transducer on what it reads of each user, fused at the newest."""
    num_users = len(inputs)
    states_TB: list[list[UserState | None]] = []
    reused_B, computed_B = [0] * num_users, [0] * num_users
    u_TBD = []
    for number, (transducer, part) in enumerate(zip(mixture.transducers, mixture.encoders(), strict=True)):
        own = [one[:, read_by(transducer, part.config.max_len, one[3])] for one in inputs]
        users = [user for user, one in enumerate(own) if one.shape[1]]
        u_BD = mixture.fusion.absent_TD[number].expand(num_users, -1).clone()
        states: list[UserState | None] = [None] * num_users
        if users:
            before = [_of_part(known[user], number) for user in users]
            found = _encode_rows(recommender, part, [own[user] for user in users], before, kernel)
            u_BD[torch.tensor(users)] = found.u_BD
            for place, user in enumerate(users):
                states[user] = _of_one(found.states[place])
                reused_B[user] += found.num_reused_B[place]
                computed_B[user] += found.num_computed_B[place]
        states_TB.append(states)
        u_TBD.append(u_BD)
    return EncodedUsers(
        u_BD=functional.normalize(mixture.fusion(u_TBD), dim=1, eps=NORM_EPS),
        states=[MixedState(parts) for parts in zip(*states_TB, strict=True)],
        num_reused_B=reused_B,
        num_computed_B=computed_B,
    )


def _of_part(known: KeptState | None, number: int) -> UserState | None:
    assert not isinstance(known, UserState), "kept under the same weights"
    return None if known is None else known.parts[number]


def _encode_rows(
    recommender: Recommender,
    encoder: HSTU | TokenHSTU,
    inputs: Sequence[Int64s],
    known: Sequence[UserState | None],
    kernel: KernelName,
) -> EncodedUsers:
    """Of users, each with at least one interaction, by one encoder."""
    users = [_User.of(one, own, encoder.plan) for one, own in zip(known, inputs, strict=True)]
    # Rows that are all new are computed apart: attention is faster where every position has a query.
    parts = [[place for place, user in enumerate(users) if (user.num_reused > 0) == has] for has in (False, True)]
    if all(parts) or not users:
        u_BD = torch.empty(len(inputs), recommender.config.embedding_dim)
        of_place: dict[int, UserState] = {}
        for places in parts:
            u_BD[torch.tensor(places)], found = _encode(recommender, encoder, [users[at] for at in places], kernel)
            of_place |= zip(places, found, strict=True)
        states = [of_place[place] for place in range(len(users))]
    else:
        u_BD, states = _encode(recommender, encoder, users, kernel)
    return EncodedUsers(
        u_BD=u_BD,
        states=states,
        num_reused_B=[user.num_reused for user in users],
        num_computed_B=[user.num_interactions - user.num_reused for user in users],
    )


def _acts(inputs_IL: Tensor) -> Acts:
    return Acts(actions_L=inputs_IL[3], values_L=inputs_IL[4].int().view(torch.float32))


@dataclass(frozen=True, slots=True)
class _User:
    """What is known of a user, and from which position on truncated layers read: of num_newest_reused of those, from
    there on, what they keep is known as well.
    """

    known: UserState | None
    inputs_In: Int64s
    num_reused: int
    start: int
    num_newest_reused: int

    @classmethod
    def of(cls, known: UserState | None, inputs_In: Int64s, plan: EncoderPlan) -> _User:
        num_reused = 0 if known is None else known.num_reusable(inputs_In, plan)
        start = plan.truncated_start(inputs_In.shape[1]) if plan.num_truncated else 0
        is_same = known is not None and known.newest is not None and known.newest.start == start
        return cls(known, inputs_In, num_reused, start, max(0, num_reused - start) if is_same else 0)

    @property
    def num_interactions(self) -> int:
        return len(self.inputs_In[0])


def _encode(
    recommender: Recommender, encoder: HSTU | TokenHSTU, users: Sequence[_User], kernel: KernelName
) -> tuple[Tensor, list[UserState]]:
    """u_BD and states of users of whom nothing is reused, or something of each."""
    core, each = (encoder, 1) if isinstance(encoder, HSTU) else (encoder.encoder, encoder.each)
    kept = _key_values(core, users, each)
    num_new = kept.new_M.shape[0]
    if isinstance(encoder, HSTU) and decodes(core, num_new, kernel):
        new_IM = _joined([user.inputs_In[:, user.num_reused :] for user in users])
        times_ms_L = _joined([user.inputs_In[1] for user in users])
        u_BD = decode_newest(core, recommender.items.weight, new_IM, times_ms_L, kept)
        return u_BD, _settled(users, kept, encoder.plan.num_unsettled, each)
    inputs_IL = torch.from_numpy(_joined([user.inputs_In for user in users]))
    num_new_B = torch.tensor([user.num_interactions - user.num_reused for user in users])
    inputs_IM = inputs_IL[:, kept.new_M[::each] // each]
    rows_M, times_ms = inputs_IM[0], (inputs_IL[1], inputs_IL[2])
    x_MD, known_M = take_items(recommender.items.weight, rows_M.clamp(min=0)), rows_M >= 0
    if isinstance(encoder, TokenHSTU):
        x_MD, known_M = encoder.tokens(x_MD, _acts(inputs_IM)), known_M.repeat_interleave(each)
        times_ms = encoder.token_times(times_ms)
    x_MD = core.extended_states(x_MD, known_M, times_ms, kept, kernel=kernel)
    if kept.newest is not None:
        num_new_B = torch.tensor([user.num_interactions - user.start - user.num_newest_reused for user in users])
    u_BD = functional.normalize(x_MD[each * num_new_B.cumsum(0) - 1], dim=1, eps=NORM_EPS)
    return u_BD, _settled(users, kept, encoder.plan.num_unsettled, each)


def _joined(parts: Sequence[Int64s]) -> Int64s:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _key_values(core: HSTU, users: Sequence[_User], each: int) -> KeyValues:
    """Room for the keys and values of all positions, what is known already in place; in tokens, ``each`` a position."""
    reused = [user.num_reused for user in users]
    rows = _rows(core, core.num_whole, [user.num_interactions for user in users], reused, each)
    for user, start in zip(users, rows.offsets.tolist(), strict=False):
        if user.known is not None:
            count = each * user.num_reused
            rows.layers[:, start : start + count] = user.known.layers[:, :count]
    if not core.plan.num_truncated:
        return rows
    lengths = [user.num_interactions - user.start for user in users]
    newest = _rows(core, core.plan.num_truncated, lengths, [user.num_newest_reused for user in users], each)
    states_WD = torch.empty(newest.layers.shape[1], core.config.embedding_dim)
    from_M, to_W, new_start = [], [], 0
    for user, start in zip(users, newest.offsets.tolist(), strict=False):
        # Of what truncated layers read, that of the first num_given positions is known.
        num_given = max(0, user.num_reused - user.start)
        if user.known is not None and num_given:
            of_known = user.known.newest
            assert of_known is not None, "truncated layers keep what they read"
            at = each * (user.start - of_known.start)
            count = each * num_given
            states_WD[start : start + count] = of_known.states_ND[at : at + count]
            count = each * user.num_newest_reused
            newest.layers[:, start : start + count] = of_known.layers[:, :count]
        skipped = max(0, user.start - user.num_reused)
        num_new = user.num_interactions - user.num_reused
        from_M.append(torch.arange(each * skipped, each * num_new) + new_start)
        to_W.append(torch.arange(each * num_given, each * (user.num_interactions - user.start)) + start)
        new_start += each * num_new
    first_B = torch.tensor([each * user.start for user in users])
    given = NewestStates(
        places_W=packed_places(rows.offsets[:-1] + first_B, newest.offsets.diff()),
        states_WD=states_WD,
        from_M=torch.cat(from_M),
        to_W=torch.cat(to_W),
        kept=newest,
    )
    return replace(rows, newest=given)


def _rows(core: HSTU, num_layers: int, lengths: Sequence[int], reused: Sequence[int], each: int) -> KeyValues:
    """Of rows of so many positions, as many of which are reused."""
    # In numpy: a few dozen numbers, for which each operation of torch would cost ten times its work.
    lengths_B, reused_B = each * np.array(lengths, np.int64), each * np.array(reused, np.int64)
    offsets, new_offsets = (np.concatenate([[0], np.cumsum(part)]) for part in (lengths_B, lengths_B - reused_B))
    places = [np.arange(known, length) for known, length in zip(reused_B, lengths_B, strict=True)]
    new_M = np.concatenate([own + start for own, start in zip(places, offsets[:-1], strict=True)])
    return KeyValues(
        layers=torch.empty(num_layers, int(offsets[-1]), KeyValues.width(core.config)),
        offsets=torch.from_numpy(offsets),
        query_offsets=torch.from_numpy(new_offsets) if any(reused) else None,
        new_M=torch.from_numpy(new_M),
        places_M=torch.from_numpy(np.concatenate(places)),
    )


def _settled(users: Sequence[_User], kept: KeyValues, num_unsettled: int, each: int) -> list[UserState]:
    """What to keep of each user: all positions but the newest."""
    states = []
    newest_starts = [0] * len(users) if kept.newest is None else kept.newest.kept.offsets.tolist()
    for user, start, newest_start in zip(users, kept.offsets.tolist(), newest_starts, strict=False):
        num_settled = max(0, user.num_interactions - num_unsettled)
        num_newest = max(0, num_settled - user.start)
        is_known = user.known is not None and user.num_reused == num_settled == user.known.inputs_IP.shape[1]
        if is_known and (kept.newest is None or user.num_newest_reused == num_newest):
            assert user.known is not None, "it is known"
            states.append(user.known)
            continue
        # Copies: a view would keep the memory of the whole batch.
        newest = None
        if kept.newest is not None:
            part = slice(newest_start, newest_start + each * num_newest)
            newest = NewestState(
                start=user.start,
                states_ND=kept.newest.states_WD[part].clone(),
                layers=kept.newest.kept.layers[:, part].clone(),
            )
        states.append(
            UserState(
                inputs_IP=user.inputs_In[:, :num_settled].copy(),
                layers=kept.layers[:, start : start + each * num_settled].clone(),
                newest=newest,
            )
        )
    return states
