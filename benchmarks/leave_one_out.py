"""Leave-one-out evaluation of next-item models as in the HSTU paper: data, training over many epochs, ranks.

The last interaction of each user is the test; all before it are the training sequence, of which the newest
``window`` positions are read. Every position is supervised, with uniform negatives of its own (papers 2402.17152,
section 4.1, and the authors' research code).

Shapes: U users, L packed positions of a batch, V items, D width, C negatives.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from kernels.jagged import row_index
from kernels.softmax_loss import sampled_softmax_loss
from model.config import ModelConfig
from model.encoder import build_encoder
from model.initial import NORM_EPS
from model.ranking import SeenRows, ranks

CUTOFFS = (1, 10, 50, 200)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """Interactions of all users, each user's in order. rows: int64, item row of each. times_s: int64.

    starts: int64[U + 1]. num_items: V, the corpus that is ranked. note: what the source's reader should know.
    """

    rows: Tensor
    times_s: Tensor
    starts: Tensor
    num_items: int
    note: str

    @property
    def num_users(self) -> int:
        return self.starts.shape[0] - 1


def read_ml1m(folder: Path) -> Sequences:
    """MovieLens-1M from its original ``ratings.dat``, or from the reconstruction ``interactions.parquet``."""
    original = folder / "ratings.dat"
    if original.exists():
        ratings = _original_ratings(original)
        ordered = ratings.sort("user_id", "timestamp", maintain_order=True)
        return _sequences(ordered, ratings["item_id"], "original file")
    ratings = pl.read_parquet(folder / "interactions.parquet")
    ordered = ratings.filter(pl.col("seq_pos") >= 0).sort("user_id", "seq_pos")
    exact = float(ratings["timestamp_exact"].mean())  # type: ignore[arg-type]
    note = (
        f"reconstruction: order exact, {100 * exact:.1f} % of timestamps exact, the others interpolated;"
        f" {len(ratings) - len(ordered)} ratings of items with fewer than 5 left out (their place is unknown),"
        " the items kept"
    )
    return _sequences(ordered, ratings["item_id"], note)


def _original_ratings(path: Path) -> pl.DataFrame:
    lines = pl.read_csv(path, has_header=False, separator="\n", new_columns=["line"], quote_char=None)
    parts = lines["line"].str.split("::").list
    names = ("user_id", "item_id", "rating", "timestamp")
    return pl.DataFrame({name: parts.get(i) for i, name in enumerate(names)}).cast(pl.Int64)


def _sequences(ordered: pl.DataFrame, corpus: pl.Series, note: str) -> Sequences:
    items = corpus.unique().sort().to_numpy()
    users: NDArray[Any] = ordered["user_id"].to_numpy()
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    return Sequences(
        rows=torch.from_numpy(np.searchsorted(items, ordered["item_id"].to_numpy())),
        times_s=torch.from_numpy(ordered["timestamp"].cast(pl.Int64).to_numpy().copy()),
        starts=torch.from_numpy(np.append(starts, len(users))),
        num_items=len(items),
        note=note,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """The research code's settings for ML-1M."""

    window: int = 200
    epochs: int = 101
    batch_users: int = 128
    num_negatives: int = 128
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    seed: int = 42
    eval_every: int = 1


class NextItemModel(nn.Module):
    """An encoder and item embeddings; scores are cosines over the temperature, without bias or trend."""

    def __init__(self, config: ModelConfig, num_items: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        self.config = config
        self.encoder = build_encoder(config, generator)
        weight = torch.empty(num_items, config.embedding_dim)
        nn.init.trunc_normal_(weight, std=config.item_init_std, generator=generator)
        self.item_weight = nn.Parameter(weight)

    def forward(self, batch: Windows, dropout: torch.Generator | None = None) -> Tensor:
        """u_LD of unit length."""
        item_LD = functional.embedding(batch.rows_L, self.item_weight)
        known_L = torch.ones_like(batch.rows_L, dtype=torch.bool)
        times_ms = (batch.times_s_L * 1000, batch.query_times_s_L * 1000)
        encoded: Tensor = self.encoder(item_LD, known_L, batch.offsets, times_ms, dropout=dropout)
        return encoded

    def unit_items(self) -> Tensor:
        """[V, D] of unit length."""
        return functional.normalize(self.item_weight, dim=1, eps=NORM_EPS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """The newest positions of some users and the item that came next at each; all int64."""

    rows_L: Tensor
    times_s_L: Tensor
    query_times_s_L: Tensor
    target_rows_L: Tensor
    offsets: Tensor


def windows(data: Sequences, users: Tensor, *, window: int, held_out: int, device: torch.device) -> Windows:
    """held_out: interactions at the end that are neither input nor target (1 in training, 0 in the test)."""
    ends = data.starts[users + 1] - 1 - held_out
    lengths = torch.minimum(ends - data.starts[users], torch.tensor(window)).clamp(min=0)
    offsets = torch.zeros(len(users) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    total = int(offsets[-1])
    row = row_index(offsets, total)
    index = (ends - lengths)[row] + torch.arange(total) - offsets[row]
    parts = (data.rows[index], data.times_s[index], data.times_s[index + 1], data.rows[index + 1], offsets)
    rows_L, times_s_L, query_times_s_L, target_rows_L, offsets = (x.to(device) for x in parts)
    return Windows(
        rows_L=rows_L,
        times_s_L=times_s_L,
        query_times_s_L=query_times_s_L,
        target_rows_L=target_rows_L,
        offsets=offsets,
    )


@dataclass
class Run:
    """One model's training, which can be stopped after any epoch and taken up again."""

    config: ModelConfig
    plan: TrainingPlan
    data: Sequences
    device: torch.device
    epoch: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = NextItemModel(self.config, self.data.num_items).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.plan.learning_rate,
            betas=self.plan.betas,
            weight_decay=0.0,
            fused=True,
        )
        self.generator = torch.Generator(device=self.device).manual_seed(self.plan.seed)
        self._order = torch.Generator().manual_seed(self.plan.seed)

    def train_epoch(self) -> dict[str, float]:
        """One pass over all users, and the test where the plan wants it; appended to the curve."""
        started = time.perf_counter()
        self.model.train()
        losses, num_positions = [], 0
        for users in torch.split(torch.randperm(self.data.num_users, generator=self._order), self.plan.batch_users):
            batch = windows(self.data, users, window=self.plan.window, held_out=1, device=self.device)
            losses.append(self.step(batch))
            num_positions += batch.rows_L.shape[0]
        self.epoch += 1
        row = {
            "epoch": self.epoch,
            "loss": float(torch.stack(losses).mean()),
            "train_s": time.perf_counter() - started,
            "positions": num_positions,
        }
        if self.epoch % self.plan.eval_every == 0 or self.epoch >= self.plan.epochs:
            row |= self.evaluate()
        self.curve.append(row)
        return row

    def step(self, batch: Windows) -> Tensor:
        """One optimiser step; the loss before it."""
        shape = (batch.rows_L.shape[0], self.plan.num_negatives)
        negative_rows = torch.randint(self.data.num_items, shape, generator=self.generator, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        found = sampled_softmax_loss(
            self.model(batch, dropout=self.generator),
            self.model.unit_items(),
            batch.target_rows_L,
            negative_rows,
            scale=1 / self.config.temperature,
        )
        found.loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return found.loss.detach()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """HR, NDCG and MRR of every user's last interaction over the full corpus; what the model was shown filtered."""
        self.model.eval()
        unit_VD = self.model.unit_items()
        found = [self._ranks(users, unit_VD) for users in torch.split(torch.arange(self.data.num_users), 512)]
        rank_U = torch.cat(found).double()
        gain_U = 1 / torch.log2(rank_U + 1)
        row = {f"hr@{k}": float((rank_U <= k).double().mean()) for k in CUTOFFS}
        row |= {f"ndcg@{k}": float((gain_U * (rank_U <= k)).mean()) for k in CUTOFFS[1:]}
        return row | {"mrr": float((1 / rank_U).mean())}

    def _ranks(self, users: Tensor, unit_VD: Tensor) -> Tensor:
        batch = windows(self.data, users, window=self.plan.window, held_out=0, device=self.device)
        last = batch.offsets[1:] - 1
        scores_UV = self.model(batch)[last] @ unit_VD.T
        seen = SeenRows(rows_S=batch.rows_L.cpu(), offsets=batch.offsets.cpu())
        return ranks(scores_UV.cpu(), batch.target_rows_L[last].cpu(), seen)

    def save(self, folder: Path) -> dict[str, Any]:
        """Everything a run needs to go on, in safetensors; returns what belongs in a JSON file beside it."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        tensors |= {"generator": self.generator.get_state(), "order": self._order.get_state()}
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / "state.safetensors.new"
        metadata = {"epoch": str(self.epoch)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata=metadata)
        beside.replace(folder / "state.safetensors")
        return {"epoch": self.epoch, "curve": self.curve}

    def load(self, folder: Path, *, curve: list[dict[str, float]]) -> None:
        """Take up a saved run at the epoch after the last one of its curve."""
        tensors = load_file(folder / "state.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        state = self.optimizer.state_dict()
        state["state"] = {
            i: {name: tensors[f"optimizer.{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
            for i in range(len(list(self.model.parameters())))
        }
        self.optimizer.load_state_dict(state)
        self.generator.set_state(tensors["generator"])
        self._order.set_state(tensors["order"])
        self.curve, self.epoch = curve, len(curve)


def epochs(run: Run, folder: Path) -> Iterator[dict[str, float]]:
    """Train what is left of the plan, saving after each epoch."""
    while run.epoch < run.plan.epochs:
        row = run.train_epoch()
        run.save(folder)
        yield row
