"""AdamW for dense parameters, row-wise AdamW or Adagrad for item rows.

Row-wise: an item's embedding shares one second moment (the mean of its squared gradient), as HSTU's authors do, so
AdamW holds D + 4 numbers for D weights and a bias, Adagrad 2. Rows that take no part in a step are not touched: neither
their weights nor their moments decay.

Shapes: R rows of one step, D width, V items.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor, nn

from kernels.dynamic_embedding import rowwise_adagrad_
from model.config import ModelConfig, OptimizerConfig
from model.errors import StateMismatchError
from model.item_model import ItemModel
from model.item_table import ActiveRows, RowMoves
from model.recommender import Recommender
from model.reserved_memory import reserved_zeros
from model.schedule import learning_rate_factor

logger = logging.getLogger(__name__)


class RecommenderOptimizer:
    """Steps dense parameters of a recommender and the item rows of each step; marks those rows dirty.

    parameters: those it steps, by name; None: all, but those of a recommender's ranking head, which learns from other
    labels in steps of its own.
    """

    def __init__(
        self, recommender: ItemModel, config: OptimizerConfig, *, parameters: dict[str, nn.Parameter] | None = None
    ) -> None:
        self.recommender = recommender
        self.config = config
        self._step = 0
        self._parameters = _own_parameters(recommender) if parameters is None else parameters
        self._dense = {
            name: (torch.zeros_like(parameter), torch.zeros_like(parameter))
            for name, parameter in self._parameters.items()
        }
        self._rows = _zero_rows(recommender.items.config, config)

    def zero_grad(self) -> None:
        """Forget the dense gradients; rows are fresh leaves in every step."""
        self.recommender.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, active: ActiveRows, *, row_factor: float = 1.0, dense_factor: float = 1.0) -> None:
        """Apply the gradients of one backward pass and forget them. Factors multiply this step's learning rates."""
        if self.config.max_gradient_norm:
            leaves = [*self._parameters.values(), active.weight_RD, active.bias_R]
            torch.nn.utils.clip_grad_norm_(leaves, self.config.max_gradient_norm)
        scheduled = learning_rate_factor(self.config, self._step + 1)
        self._step_dense(self.config.dense_learning_rate * dense_factor * scheduled)
        self._step_rows(active, self.config.row_learning_rate * row_factor * scheduled)
        self.zero_grad()

    def _step_dense(self, learning_rate: float) -> None:
        config = self.config
        self._step += 1
        correction1, correction2 = 1 - config.beta1**self._step, 1 - config.beta2**self._step
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            first, second = self._dense[name]
            first.lerp_(parameter.grad, 1 - config.beta1)
            second.mul_(config.beta2).addcmul_(parameter.grad, parameter.grad, value=1 - config.beta2)
            parameter.mul_(1 - learning_rate * config.dense_weight_decay)
            root = (second / correction2).sqrt_().add_(config.epsilon)
            parameter.addcdiv_(first, root, value=-learning_rate / correction1)

    def _step_rows(self, active: ActiveRows, learning_rate: float) -> None:
        items = self.recommender.items
        if active.rows_R.shape[0] == 0 or active.weight_RD.grad is None:
            return
        if self.config.row_optimizer == "adagrad":
            self._step_rows_by_adagrad(active, learning_rate)
            return
        grad_RD, grad_R, rows_R = active.weight_RD.grad, active.bias_R.grad, active.rows_R
        state = {name: column[rows_R] for name, column in self._rows.items()}
        state["steps"] += 1
        weight_RD, bias_R = items.weight[rows_R], items.bias[rows_R]
        weight_RD.mul_(1 - learning_rate * self.config.row_weight_decay)
        move = partial(self._move, steps_R=state["steps"], learning_rate=learning_rate)
        move(weight_RD, grad_RD, state["first"], state["second"])
        if grad_R is not None:  # the ranking head reads no biases
            move(bias_R[:, None], grad_R[:, None], state["bias_first"][:, None], state["bias_second"])
        for name, column in self._rows.items():
            column[rows_R] = state[name]
        items.weight[rows_R], items.bias[rows_R] = weight_RD, bias_R
        items.mark_changed(rows_R)

    def _step_rows_by_adagrad(self, active: ActiveRows, learning_rate: float) -> None:
        items, rows_R = self.recommender.items, active.rows_R
        assert active.weight_RD.grad is not None
        step = partial(rowwise_adagrad_, learning_rate=learning_rate, epsilon=self.config.epsilon)
        second, bias_second = self._rows["second"], self._rows["bias_second"]
        step(items.weight, second, rows_R, active.weight_RD.grad, weight_decay=self.config.row_weight_decay)
        if active.bias_R.grad is not None:  # the ranking head reads no biases
            step(items.bias[:, None], bias_second, rows_R, active.bias_R.grad[:, None])
        items.mark_changed(rows_R)

    def _move(
        self,
        weight_RD: Tensor,
        grad_RD: Tensor,
        first_RD: Tensor,
        second_R: Tensor,
        *,
        steps_R: Tensor,
        learning_rate: float,
    ) -> None:
        config = self.config
        first_RD.lerp_(grad_RD, 1 - config.beta1)
        second_R.lerp_(grad_RD.square().mean(1), 1 - config.beta2)
        root_R = (second_R / (1 - config.beta2**steps_R)).sqrt_().add_(config.epsilon)
        size_R = learning_rate / ((1 - config.beta1**steps_R) * root_R)
        weight_RD.addcmul_(first_RD, size_R[:, None], value=-1)

    def follow(self, moves: RowMoves) -> None:
        """Move the state of rows as ``ItemTable.remove`` moved the rows."""
        for column in self._rows.values():
            moves.follow(column)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of every moment and count, as plain tensors; rows up to num_items only."""
        state = {"step": torch.tensor([self._step], dtype=torch.int64)}
        for name, (first, second) in self._dense.items():
            state[f"dense.first.{name}"] = first.to("cpu", copy=True)
            state[f"dense.second.{name}"] = second.to("cpu", copy=True)
        num_items = self.recommender.items.num_items
        return state | {f"rows.{name}": column[:num_items].clone() for name, column in self._rows.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace everything; load the recommender first. StateMismatchError (nothing replaced) if it does not fit.

        The state of another row optimiser is not used: its rows start anew, and the log says so.
        """
        rows = {
            f"rows.{name}": column for name, column in _zero_rows(self.recommender.items.config, self.config).items()
        }
        is_other = rows.keys() != {name for name in state if name.startswith("rows.")}
        if is_other:
            logger.warning("the checkpoint is of another optimizer.row_optimizer: moments of item rows start anew")
            state = {name: tensor for name, tensor in state.items() if not name.startswith("rows.")}
        want = {name: tuple(t.shape) for name, t in self.state_dict().items() if not (is_other and name in rows)}
        got = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if want != got:
            differing = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
            raise StateMismatchError(f"optimiser state differs in name or shape: {', '.join(differing)}")
        self._step = int(state["step"])
        self._dense = {
            name: (
                state[f"dense.first.{name}"].to(first.device, copy=True),
                state[f"dense.second.{name}"].to(first.device, copy=True),
            )
            for name, (first, _) in self._dense.items()
        }
        self._rows = {name.removeprefix("rows."): column for name, column in rows.items()}
        if not is_other:
            for name, column in rows.items():
                column[: self.recommender.items.num_items] = state[name]


def _own_parameters(model: ItemModel) -> dict[str, nn.Parameter]:
    return model.retrieval_parameters() if isinstance(model, Recommender) else dict(model.named_parameters())


def _zero_rows(config: ModelConfig, optimizer: OptimizerConfig) -> dict[str, Tensor]:
    """Moments and counts of every item there may ever be."""
    columns = {"second": reserved_zeros(config.max_items), "bias_second": reserved_zeros(config.max_items)}
    if optimizer.row_optimizer == "adagrad":
        return columns
    return columns | {
        "first": reserved_zeros(config.max_items, config.embedding_dim),
        "bias_first": reserved_zeros(config.max_items),
        "steps": reserved_zeros(config.max_items),
    }
