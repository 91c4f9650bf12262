"""Which interactions each transducer of a mixture reads. Without torch: commands read settings that compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from model.config import ModelConfig

ALL_ACTIONS: Final = 0xFFFF_FFFF
"""Bits of an interaction's acts that are actions; those above say where it happened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transducer:
    """An encoder of its own for one kind of signal: the interactions in which one of ``actions`` was done."""

    name: str
    """For people: what kind of signal it reads."""
    actions: tuple[str, ...]
    """Names of events.actions."""
    max_len: int | None = None
    """Newest of its interactions that it reads; None: as many as the model."""
    num_layers: int | None = None
    """None: as many as the model."""
    mask: int = 0
    """Bits of ``actions``, from events.actions (``with_action_bits``)."""

    @classmethod
    def of(cls, given: Transducer | dict[str, Any]) -> Transducer:
        """From a table of settings, as well. ValueError for a key that does not exist, or is missing."""
        if isinstance(given, Transducer):
            return replace(given, actions=tuple(given.actions))
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(
                    f"transducers has the key {name!r}, which does not exist: known are {', '.join(known)}"
                )
        if not {"name", "actions"} <= given.keys():
            raise ValueError("transducers needs name and actions of each")
        return cls(**(given | {"actions": tuple(given["actions"])}))


def check_transducers(config: ModelConfig) -> None:
    """ValueError for transducers that cannot be meant."""
    names = [one.name for one in config.transducers]
    if len(names) > 16 or len(set(names)) != len(names):
        raise ValueError(f"transducers are {', '.join(names)}: there can be at most 16, each with a name of its own")
    if names and config.kind in ("sasrec", "gru"):
        raise ValueError(f"transducers are for hstu and ultra_hstu, not for {config.kind}: leave them out")
    for one in config.transducers:
        if not one.actions:
            raise ValueError(f"transducers: {one.name} names no actions, so it would read nothing: give it some")
        if one.max_len is not None and not 1 <= one.max_len <= config.max_len:
            raise ValueError(
                f"transducers: max_len of {one.name} is {one.max_len}; it must be between 1 and max_len"
                f" ({config.max_len}), since only that many interactions of a history are looked through"
            )
        if one.num_layers is not None and not 1 <= one.num_layers <= 1 << 20:
            raise ValueError(f"transducers: num_layers of {one.name} is {one.num_layers}; it must be 1 or more")


def with_action_bits(model: ModelConfig, actions: Sequence[str]) -> ModelConfig:
    """The model whose transducers know their bits. actions: as declared, in order of their bits.

    ValueError for a transducer of an action that is not declared: nothing would ever match it.
    """
    if not model.transducers:
        return model
    found = []
    for one in model.transducers:
        unknown = [name for name in one.actions if name not in actions]
        if unknown:
            raise ValueError(
                f"model.transducers: {one.name} reads {', '.join(unknown)}; declared in events.actions are"
                f" {', '.join(actions)}"
            )
        found.append(replace(one, mask=sum(1 << actions.index(name) for name in set(one.actions))))
    return replace(model, transducers=tuple(found))


def part_config(model: ModelConfig, transducer: Transducer) -> ModelConfig:
    """The model as one transducer has it: limits that it does not reach are none."""
    num_layers = model.num_layers if transducer.num_layers is None else transducer.num_layers
    max_len = model.max_len if transducer.max_len is None else transducer.max_len

    def at_most(value: int | None, limit: int) -> int | None:
        return None if value is None else min(value, limit)

    truncated_len = at_most(model.truncated_len, max_len)
    return replace(
        model,
        transducers=(),
        max_len=max_len,
        num_layers=num_layers,
        truncated_layers=at_most(model.truncated_layers, num_layers - 1),
        truncated_len=truncated_len,
        truncated_hop=at_most(model.truncated_hop, min(512, max_len) if truncated_len is None else truncated_len),
    )


def read_by(transducer: Transducer, max_len: int, actions_n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of one history that a transducer reads: its own, the newest max_len at most."""
    own = np.flatnonzero((actions_n & ALL_ACTIONS == 0) | (actions_n & transducer.mask != 0))
    return own[hop_start(len(own), max_len, hop_of(max_len)) :]


def hop_start(count: int, longest: int, hop: int) -> int:
    """The first of ``count`` in order that is read, of the newest ``longest`` at most: moves on in hops."""
    return -(-max(0, count - longest) // hop) * hop


def hop_of(longest: int) -> int:
    """Hop of a transducer's own length: an eighth of it, as of what truncated layers read."""
    return max(1, longest // 8)
