"""What has become of labels that were read: where to read on, which were learned from, and how many were not.

Labels come again after a crash of whoever joins them, so those learned from last are remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online_trainer.label_queue import LabelBatch, LabelPosition, LearnedLabels


@dataclass(slots=True)
class LabelAccount:
    """What has become of the labels read; part of every checkpoint. All count items."""

    log_id: str
    positions: dict[int, LabelPosition] = field(default_factory=dict)
    """Partition of `labels` → where to continue."""
    num_learned: int = 0
    num_late: int = 0
    """Of them, corrections of labels that said `not_taken`: learned from, and not measured again."""
    num_repeated: int = 0
    """Labels that had been learned from and came again."""
    num_unlisted: int = 0
    """Labels of items without a row in the model."""
    num_quarantined: int = 0
    """Labels in batches that were set aside."""
    num_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    def counts(self) -> dict[str, object]:
        """By name, JSON-ready."""
        names = [name for name in self.__dataclass_fields__ if name.startswith("num_")]
        return {name.removeprefix("num_"): getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> LabelAccount:
        """Read `to_dict`'s form."""
        positions = {int(number): LabelPosition(**at) for number, at in stored["positions"].items()}
        return cls(**(stored | {"positions": positions}))


class LabelBook:
    """The account of one learner, and the labels that it learned from last."""

    def __init__(self, log_id: str, *, remembered: int) -> None:
        """remembered: how many labels are."""
        self.account = LabelAccount(log_id)
        self._learned = LearnedLabels(remembered)

    def are_new(self, batch: LabelBatch) -> NDArray[np.bool_]:
        """bool[C], labels that have not been learned from."""
        return self._learned.are_new(batch.keys)

    def record(self, batch: LabelBatch, is_new: NDArray[np.bool_]) -> None:
        """A batch has been dealt with. is_new: as `are_new` said before."""
        self._learned.add(batch.keys[is_new])
        self.account.num_repeated += int((~is_new).sum())
        self.account.num_late += int((is_new & batch.is_late).sum())
        self.account.positions.update(batch.positions)

    def keys(self) -> Tensor:
        """int64, of the labels remembered; part of a checkpoint beside the account."""
        return torch.from_numpy(self._learned.state())

    def load(self, account: Mapping[str, Any], keys: Tensor) -> None:
        """Continue from the account and `keys()`; when the log has another name now, labels begin anew there."""
        log_id = self.account.log_id
        self.account = LabelAccount.from_dict(dict(account))
        if self.account.log_id != log_id:
            self.account = replace(self.account, log_id=log_id, positions={})
        self._learned.load_state(keys.numpy())
