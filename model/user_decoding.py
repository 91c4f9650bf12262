"""The newest states of cached histories by compiled code, prepared in NumPy: for the one or two positions of a request
each of torch's operations would cost more than its work, and lets another thread take the interpreter away.

Shapes: B users, L packed positions, M of them computed now, V items, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.implementations import KernelName
from model.initial import NORM_EPS
from model.key_values import KeyValues

if TYPE_CHECKING:
    from model.hstu import HSTU

Int64s = NDArray[np.int64]


def decodes(core: HSTU, num_new: int, kernel: KernelName) -> bool:
    """Whether ``decode_newest`` is there for this encoder and so many new positions, and faster than the layers."""
    return kernel == "auto" and core.plan.num_truncated == 0 and core.decodes(num_new, torch.float32)


def decode_newest(core: HSTU, item_VD: Tensor, inputs_IM: Int64s, times_ms_L: Int64s, kept: KeyValues) -> Tensor:
    """u_BD of unit length, of users with at least one new position each; as ``HSTU.extended_states``.

    item_VD: float32 on the CPU. inputs_IM: item row (-1: reads as zeros), time and query time of each new position. The
    new positions' keys and values are written into ``kept``. ValueError if a row is longer than max_len.
    """
    rows_M, asked_ms_M, places_M = inputs_IM[0], inputs_IM[2], kept.places_M.numpy()
    config, place_ND = core.config, core.input.position_embedding.detach().numpy()
    if places_M.max() >= config.max_len:
        raise ValueError(f"the longest row has {int(places_M.max()) + 1} places; max_len is {config.max_len}")
    x_MD = place_ND[places_M]
    is_known_M = rows_M >= 0
    if is_known_M.all():
        x_MD += item_VD.numpy()[rows_M] * np.float32(config.embedding_dim**0.5)
    else:
        x_MD[is_known_M] += item_VD.numpy()[rows_M[is_known_M]] * np.float32(config.embedding_dim**0.5)
        x_MD[~is_known_M] = 0
    times_s = (torch.from_numpy(times_ms_L // 1000), torch.from_numpy(asked_ms_M // 1000))
    x_MD = core.decoded(torch.from_numpy(x_MD), times_s, kept).numpy()
    offsets = kept.offsets if kept.query_offsets is None else kept.query_offsets
    u_BD = x_MD[offsets.numpy()[1:] - 1]
    u_BD /= np.maximum(np.sqrt(np.einsum("bd,bd->b", u_BD, u_BD)), NORM_EPS)[:, None]
    return torch.from_numpy(u_BD)
