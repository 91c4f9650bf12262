"""The growing table of items: embeddings, biases and trend, one row an item, and which rows changed.

Shapes: V rows in use (the live catalogue), R rows of one call, D embedding width, N interactions of one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.errors import ItemTableFullError, StateMismatchError
from model.id_index import IdIndex, mix64
from model.reserved_memory import reserved_zeros
from model.trend import add_interactions, decay_rate_per_ms, log_popularity

Int64s = NDArray[np.int64]

_HELD_MAX = 500
"""Numbers that numpy assigns by index without letting go of the interpreter; for one more, it does."""
_COLUMNS = ("weight", "bias", "trend", "content", "seen_ms", "dirty", "unsent")
_CONTENT = ("num_items", "trend_as_of_ms", "all_unsent", "_removed_ids", "_index", "_ids", *_COLUMNS)


CONTENT_DIM: Final = 64
"""C: what is known about items besides their interactions is projected to this width, where a model reads it."""

CentreOf = Callable[[Int64s, Tensor], Tensor]
"""From N new ids and float32[D], where new rows start, to float32[N, D], where each of these does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveRows:
    """Rows taking part in one training step, as leaves that collect gradients.

    rows_R: int64[R], ascending. weight_RD, bias_R: float32 leaves, copies of the table's rows.
    """

    rows_R: Tensor
    weight_RD: Tensor
    bias_R: Tensor

    def index_of(self, rows: Tensor) -> Tensor:
        """int64, shape of rows: where each row stands in rows_R; rows must be active."""
        return torch.searchsorted(self.rows_R, rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMoves:
    """How rows moved together when items were removed: whatever else is kept by row must follow.

    sources, targets: int64[K], where K rows were and are. num_before, num_after: rows in use.
    """

    sources: Tensor
    targets: Tensor
    num_before: int
    num_after: int

    def follow(self, column_V: Tensor) -> None:
        """Move the content of a column, any number of values a row, likewise; rows no longer in use become zeros."""
        column_V[self.targets] = column_V[self.sources]
        column_V[self.num_after : self.num_before] = 0

    def new_rows(self) -> Tensor:
        """int64[num_before]: where each row is now, -1 for those of the removed items."""
        rows_V = torch.arange(self.num_before)
        rows_V[self.targets] = rows_V[self.num_after :] = -1
        rows_V[self.sources] = self.targets
        return rows_V


@dataclass(frozen=True, kw_only=True, slots=True)
class RowChange:
    """Removals and new content of rows, looked up and with room made, by ``ItemTable.plan``.

    rows: int64[R], where each row of the content goes. removed_ids, removed_rows: int64[K], distinct known items and
    where they are. new_ids: ids of the rows from first to end - 1, new_slots: their slots in the index. index: the
    table's index with more slots; None where there is room already.
    """

    rows: Int64s
    removed_ids: Int64s
    removed_rows: Int64s
    new_ids: Int64s
    new_slots: Int64s
    first: int
    end: int
    index: IdIndex | None


class ItemTable:
    """Rows 0 … num_items - 1: new items last. Where items are retired, the last rows move into their places.

    weight: float32[max_items, D]. bias: float32[max_items]. trend: float64[max_items], log decayed popularity (see
    model.trend), -inf without interactions. seen_ms: int64[max_items], event time of an item's newest interaction (0:
    none; not part of snapshots). Where a snapshot removes an item, its row stays behind with bias -inf, so that it is
    never ranked, until the next anchor. content: float16[max_items, C], what is known about an item besides its
    interactions, zeros where nothing is; C is 0 for models that do not read it. dirty: bool[max_items], rows changed
    since ``clear_dirty``. unsent: bool[max_items], rows whose embedding changed since `model.device_rows` last looked;
    all_unsent: all of them may have. All on the CPU, in reserved memory: rows beyond num_items hold anything, and a
    table grows without being copied.
    """

    def __init__(self, config: ModelConfig, *, content_dim: int = 0) -> None:
        self.config = config
        self.content_dim = content_dim
        self.num_items = 0
        self.trend_as_of_ms = 0
        self._rate_per_ms = decay_rate_per_ms(config.trend_half_life_s)
        self._removed_ids: list[int] = []
        self._index = IdIndex()
        self._ids: Int64s = reserved_zeros(config.max_items, dtype=torch.int64).numpy()
        self.weight = reserved_zeros(config.max_items, config.embedding_dim)
        self.bias = reserved_zeros(config.max_items)
        self.trend = reserved_zeros(config.max_items, dtype=torch.float64)
        # Halves are exact to 1/2000 of a unit vector's numbers, and travel in every row of a snapshot.
        self.content = reserved_zeros(config.max_items, content_dim, dtype=torch.float16)
        self.seen_ms = reserved_zeros(config.max_items, dtype=torch.int64)
        self.dirty = reserved_zeros(config.max_items, dtype=torch.bool)
        self.unsent = reserved_zeros(config.max_items, dtype=torch.bool)
        self.all_unsent = True

    def storage(self) -> tuple[object, ...]:
        """Everything allocated, by reference. Who holds this decides when it is freed, once it has been replaced."""
        return self._index, self._ids, *(getattr(self, name) for name in _COLUMNS)

    def ids(self) -> Int64s:
        """int64[V]: the id of each row, -1 where the item was removed."""
        return self._ids[: self.num_items].copy()

    def ids_of(self, rows: Int64s) -> Int64s:
        """int64, shape of rows: the id of each row."""
        return self._ids[rows]

    def lookup(self, ids: Int64s) -> Int64s:
        """int64[N]: the row of each id, -1 where it is unknown."""
        return self._index.find(ids)

    def admit(self, ids: Int64s, *, centre_of: CentreOf | None = None, as_of_ms: int = 0) -> Int64s:
        """int64[N]: the row of each id; unknown ones get new rows in order of first appearance.

        A new row starts at the mean of the newcomer_window last ones, or where ``centre_of`` says, and something that
        depends on the seed and its id only. ItemTableFullError (and nothing admitted) beyond max_items, ValueError for
        a negative id. as_of_ms: the age of a new row counts from here until its first interaction.
        """
        rows = self._index.find(ids)
        unknown = np.unique(ids[rows < 0], return_index=True)
        if len(unknown[0]) == 0:
            return rows
        if int(unknown[0][0]) < 0:
            raise ValueError(f"item id {int(unknown[0][0])} is negative; ids are 63-bit")
        new_ids = ids[rows < 0][np.sort(unknown[1])]
        newcomers = self.weight[max(self.num_items - self.config.newcomer_window, 0) : self.num_items]
        centre_D = newcomers.mean(0) if len(newcomers) else torch.zeros(self.config.embedding_dim)
        centre = centre_D if centre_of is None else centre_of(new_ids, centre_D)
        self._append(new_ids, initial_embeddings(new_ids, self.config) + centre)
        self.seen_ms[self.num_items - len(new_ids) : self.num_items] = as_of_ms
        return self._index.find(ids)

    def _append(self, ids: Int64s, weight_RD: Tensor) -> None:
        if len(ids) == 0:
            return
        first, end = self.num_items, self.num_items + len(ids)
        if end > self.config.max_items:
            raise ItemTableFullError(
                f"{end} items are more than max_items ({self.config.max_items}): raise max_items or retire items"
            )
        self._index.put(ids, np.arange(first, end))
        self._ids[first:end] = ids
        self.weight[first:end] = weight_RD
        self.bias[first:end] = 0
        self.trend[first:end] = -torch.inf
        self.content[first:end] = 0
        self.seen_ms[first:end] = 0
        self.mark_changed(slice(first, end))
        self.num_items = end

    def mark_changed(self, rows: Tensor | slice) -> None:
        """Note that embeddings were written to."""
        self.dirty[rows] = True
        self.unsent[rows] = True

    def alike(self) -> ItemTable:
        """An empty table of the same configuration."""
        return ItemTable(self.config, content_dim=self.content_dim)

    def describe(self, rows: Int64s, content_RC: NDArray[np.float32]) -> None:
        """Set what is known about the items of these rows, int64[R] >= 0; float32[R, C]. Nothing where C is 0."""
        if self.content_dim == 0 or len(rows) == 0:
            return
        index = torch.from_numpy(rows)
        content = torch.from_numpy(content_RC).half()
        changed = (self.content[index] != content).any(1)
        self.content[index[changed]] = content[changed]
        self.dirty[index[changed]] = True

    def content_of(self, rows: Tensor) -> Tensor | None:
        """float32[N, C] of int64[N] rows, zeros where the row is -1; None where C is 0."""
        if self.content_dim == 0:
            return None
        return self.content[rows.clamp(min=0)].float() * (rows >= 0)[:, None]

    def activate(self, rows: Tensor) -> ActiveRows:
        """Leaves for one training step: the distinct rows of ``rows``; -1 is ignored."""
        rows_R = torch.unique(rows)
        rows_R = rows_R[rows_R >= 0]
        return ActiveRows(
            rows_R=rows_R,
            weight_RD=self.weight[rows_R].requires_grad_(),
            bias_R=self.bias[rows_R].requires_grad_(),
        )

    def observe(self, rows: Int64s, times_ms: Int64s) -> None:
        """Count interactions into the trend, in any order. rows: int64[N] >= 0; times_ms: int64[N], epoch ms."""
        if len(rows) == 0:
            return
        touched = add_interactions(self.trend, rows, times_ms, rate_per_ms=self._rate_per_ms)
        self.dirty[torch.from_numpy(touched)] = True
        np.maximum.at(self.seen_ms.numpy(), rows, times_ms)
        self.trend_as_of_ms = max(self.trend_as_of_ms, int(times_ms.max()))

    def log_popularity(self, rows: Tensor | None = None) -> Tensor:
        """float32[V], or float32[R] of ``rows``: log(decayed popularity + floor) when the newest interaction came."""
        trend = self.trend[: self.num_items] if rows is None else self.trend[rows]
        return self.log_popularity_of(trend, as_of_ms=self.trend_as_of_ms)

    def log_popularity_of(self, trend: Tensor, *, as_of_ms: int) -> Tensor:
        """float32, shape of trend: what ``log_popularity`` is with this trend at this time."""
        return log_popularity(trend, as_of_ms=as_of_ms, rate_per_ms=self._rate_per_ms, floor=self.config.trend_floor)

    def remove(self, ids: Int64s) -> RowMoves:
        """Retire items for good and close the gaps; unknown ids are ignored. An id that comes back later is new."""
        known = np.unique(ids[self._index.find(ids) >= 0]) if len(ids) else ids
        gone, num_before = np.sort(self._index.find(known)), self.num_items
        num_after = num_before - len(known)
        self._index.remove(known)
        self._removed_ids += known.tolist()
        targets = gone[gone < num_after]
        sources = np.setdiff1d(np.arange(num_after, num_before), gone, assume_unique=True)
        moves = RowMoves(
            sources=torch.from_numpy(sources),
            targets=torch.from_numpy(targets),
            num_before=num_before,
            num_after=num_after,
        )
        self._index.change(self._ids[sources], targets)
        for column in (torch.from_numpy(self._ids), *(getattr(self, name) for name in _COLUMNS)):
            moves.follow(column)
        self.num_items = num_after
        self.unsent[moves.targets] = True
        return moves

    def plan(self, removed_ids: Int64s, ids: Int64s) -> RowChange:
        """Work out a change without making it: remove some items, then overwrite the rows of distinct `ids`.

        Unknown ids are to get new rows, in order. Reads only, so it may run while another thread reads the table;
        valid until the table changes. ItemTableFullError beyond max_items.
        """
        removed_ids = np.unique(removed_ids)
        removed_rows = self._index.find(removed_ids)
        removed_ids, removed_rows = removed_ids[removed_rows >= 0], removed_rows[removed_rows >= 0]
        rows = self._index.find(ids)
        # An id that comes back with the change that removes it gets a new row.
        is_new = (rows < 0) | np.isin(ids, removed_ids)
        new_ids, first = ids[is_new], self.num_items
        end = first + len(new_ids)
        if end > self.config.max_items:
            raise ItemTableFullError(f"{len(new_ids)} new items exceed max_items ({self.config.max_items})")
        rows[is_new] = np.arange(first, end)
        roomier_index = self._index.roomier(len(new_ids))
        return RowChange(
            rows=rows,
            removed_ids=removed_ids,
            removed_rows=removed_rows,
            new_ids=new_ids,
            new_slots=(self._index if roomier_index is None else roomier_index).free_slots(new_ids),
            first=first,
            end=end,
            index=roomier_index,
        )

    def carry_out(
        self,
        change: RowChange,
        weight_RD: Tensor,
        bias_R: Tensor,
        trend_R: Tensor,
        content_RC: Tensor | None = None,
    ) -> None:
        """Make a planned change; nothing is dirty afterwards, whatever was before. content: None where C is 0."""
        assert change.first == self.num_items, "the table has changed since this was planned"
        if change.index is not None:
            self._index = change.index
        # Through numpy, in parts: torch lets go of the interpreter in each call, and a busy thread keeps it for 5 ms.
        weight_VD, bias_V, trend_V = self.weight.numpy(), self.bias.numpy(), self.trend.numpy()
        if len(change.removed_ids):
            removed = change.removed_rows
            self._index.remove(change.removed_ids)
            self._ids[removed] = -1
            assign(weight_VD, removed, 0.0)
            assign(bias_V, removed, -np.inf)
            assign(trend_V, removed, -np.inf)
        self._index.fill(change.new_slots, change.new_ids, np.arange(change.first, change.end))
        self._ids[change.first : change.end] = change.new_ids
        rows = change.rows
        write_rows(self.weight, rows, weight_RD)
        if content_RC is not None:
            write_rows(self.content, rows, content_RC)
        assign(bias_V, rows, bias_R.numpy())
        assign(trend_V, rows, trend_R.numpy())
        self.num_items = change.end
        self.all_unsent = True
        self.clear_dirty()

    def put_back(
        self, num_items: int, rows: Tensor, ids: Int64s, columns: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> None:
        """Undo admissions beyond ``num_items`` and restore ``rows``: weight_RD, bias_R, trend_R, content_RC."""
        late = self._ids[num_items : self.num_items]
        self._index.remove(late[late >= 0])
        late[:] = -1
        self.num_items = num_items
        self.all_unsent = True
        self._ids[rows.numpy()] = ids
        back = (ids >= 0) & (self._index.find(ids) < 0)
        self._index.put(ids[back], rows.numpy()[back])
        self.weight[rows], self.bias[rows], self.trend[rows], self.content[rows] = columns

    def exchange(self, other: ItemTable) -> None:
        """Swap everything with a table of the same configuration, by reference."""
        if other.config != self.config or other.content_dim != self.content_dim:
            raise StateMismatchError("item tables of different configurations cannot be exchanged")
        for name in _CONTENT:
            mine = getattr(self, name)
            setattr(self, name, getattr(other, name))
            setattr(other, name, mine)

    def dirty_rows(self) -> Tensor:
        """int64[R], ascending: rows changed since ``clear_dirty``; what a delta must carry."""
        present = torch.from_numpy(self._ids[: self.num_items] >= 0)
        return (self.dirty[: self.num_items] & present).nonzero().flatten()

    def removed_ids(self) -> Int64s:
        """int64: ids removed since ``clear_dirty``, in that order."""
        return np.array(self._removed_ids, dtype=np.int64)

    def clear_dirty(self) -> None:
        """Start counting changes afresh: a snapshot has been taken."""
        # Not by numpy, which lets go of the interpreter for so many numbers: this is part of a hot swap's pause.
        self.dirty.numpy().view(np.uint8).data[: self.num_items] = bytes(self.num_items)
        self._removed_ids.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything, as plain tensors."""
        n = self.num_items
        content = {"content": self.content[:n].clone()} if self.content_dim else {}
        return content | {
            "ids": torch.from_numpy(self._ids[:n].copy()),
            "weight": self.weight[:n].clone(),
            "bias": self.bias[:n].clone(),
            "trend": self.trend[:n].clone(),
            "seen_ms": self.seen_ms[:n].clone(),
            "dirty": self.dirty[:n].clone(),
            "removed_ids": torch.tensor(self._removed_ids, dtype=torch.int64),
            "trend_as_of_ms": torch.tensor([self.trend_as_of_ms], dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace everything by a ``state_dict``; nothing is replaced if it does not fit.

        StateMismatchError for another structure, ItemTableFullError for more items than max_items.
        """
        want: dict[str, Any] = {key: value.dtype for key, value in self.alike().state_dict().items()}
        n = state["ids"].shape[0] if "ids" in state else -1
        if {key: value.dtype for key, value in state.items()} != want or state["weight"].shape != (
            n,
            self.config.embedding_dim,
        ):
            raise StateMismatchError(f"an item table needs {sorted(want)} of width {self.config.embedding_dim}")
        if n > self.config.max_items:
            raise ItemTableFullError(
                f"{n} items are more than max_items ({self.config.max_items}): raise max_items to at least {n}"
            )
        self.restore(state["ids"].numpy(), state["weight"], state["bias"], state["trend"], state.get("content"))
        self.seen_ms[:n], self.dirty[:n] = state["seen_ms"], state["dirty"]
        self._removed_ids = state["removed_ids"].tolist()
        self.trend_as_of_ms = int(state["trend_as_of_ms"])

    def restore(
        self, ids: Int64s, weight_VD: Tensor, bias_V: Tensor, trend_V: Tensor, content_VC: Tensor | None = None
    ) -> None:
        """Replace all rows (ids of -1 are removed items); nothing is dirty afterwards. content: None where C is 0."""
        n = len(ids)
        self._index = IdIndex()
        kept = np.flatnonzero(ids >= 0)
        self._index.put(ids[kept], kept)
        self._ids[:n], self.weight[:n], self.bias[:n], self.trend[:n] = ids, weight_VD, bias_V, trend_V
        if content_VC is not None:
            self.content[:n] = content_VC
        self.seen_ms[:n], self.dirty[:n] = 0, False
        self._removed_ids = []
        self.all_unsent = True
        self.num_items = n


def assign(table: NDArray[Any], rows: Int64s, content: NDArray[Any] | float) -> None:
    """``table[rows] = content`` for a table of numbers or rows of them, without letting go of the interpreter."""
    step = max(1, _HELD_MAX // math.prod(table.shape[1:]))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        table[rows[part]] = content[part] if isinstance(content, np.ndarray) else content


def write_rows(table_VD: Tensor, rows: Int64s, content_RD: Tensor) -> None:
    """``table_VD[rows] = content_RD`` for a contiguous table, each row written as a whole; as ``assign``."""
    assert table_VD.dtype == content_RD.dtype and table_VD.shape[1] == content_RD.shape[1]  # noqa: PT018
    whole_row = np.dtype((np.void, table_VD.shape[1] * table_VD.element_size()))
    assign(table_VD.numpy().view(whole_row)[:, 0], rows, content_RD.contiguous().numpy().view(whole_row)[:, 0])


def initial_embeddings(ids: Int64s, config: ModelConfig) -> Tensor:
    """float32[N, D]: normal, cut at two standard deviations, a function of (seed, id) only."""
    columns = mix64(np.arange(config.embedding_dim, dtype=np.uint64) + np.uint64(config.seed))
    bits = mix64(mix64(ids.astype(np.uint64))[:, None] ^ columns[None, :])
    uniform = torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    # The normal quantile of a uniform between the quantiles of -2 and +2 standard deviations.
    low, high = -0.954499736103642, 0.954499736103642
    normal = torch.erfinv(low + (high - low) * uniform) * 2**0.5
    return (normal * config.item_init_std).to(torch.float32)
