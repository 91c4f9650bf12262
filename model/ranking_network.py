"""Ranking in the generative formulation (HSTU, arXiv 2402.17152): what a user will do with an item, from one sequence.

The candidate enters the encoder as the last token of the user's history, so that every layer compares the two; small
heads read its output. See sequence.py for the two forms of tokens.

Shapes: B users, L interactions, C candidates, T tokens, D width, K tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.implementations import KernelName
from model.action_encoder import ActionEncoder, ActionEncoderConfig
from model.action_heads import ActionHeads, ActionLabels, ActionTask
from model.config import ModelConfig
from model.hstu import HSTU
from model.initial import NORM_EPS
from model.llatte_ranking_config import LlatteRankingConfig
from model.mixture import Fusion, checked_transducers, reads
from model.sequence import Candidates, Interactions, TokenSequence, interleaved, merged
from model.transducers import part_config


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingConfig:
    """What a ranking network adds to the encoder that ModelConfig describes."""

    tasks: tuple[ActionTask, ...]
    """What is predicted about a candidate."""
    num_actions: int
    """Kinds of action in a history; kind k is bit k of an interaction's actions."""
    tokens: Literal["interleaved", "merged"] = "interleaved"
    """interleaved: item and action are two tokens, and every item predicts its action. merged: one token, a quarter
    of the attention; only candidates predict."""
    value_thresholds: tuple[float, ...] = ()
    """Thresholds of an interaction's value that its action's embedding tells apart (ActionEncoderConfig)."""
    surfaces: bool = False
    """Whether where an interaction happened is part of its token (ActionEncoderConfig)."""
    action_dim: int = 8
    """Width of the learned vector of one kind of action, before the matrix to the model's width."""
    task_hidden_dim: int = 64
    """Width of the hidden layer that the tasks share."""
    max_candidates: int = 64
    """Candidates of one user in one pass at most. With the tokens of the longest history it is the constant that
    attention sums are divided by, so weights belong to one value of it."""

    def __post_init__(self) -> None:
        if self.tokens not in ("interleaved", "merged"):
            raise ValueError(f"tokens is {self.tokens!r}; it must be interleaved or merged")
        for name in ("task_hidden_dim", "max_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for task in self.tasks:
            if task.action_bit is not None and task.action_bit >= self.num_actions:
                raise ValueError(
                    f"action_bit of task {task.name!r} is {task.action_bit}; num_actions is {self.num_actions}"
                )

    def encoder_config(self, model: ModelConfig) -> ModelConfig:
        """The encoder over tokens: ``model``, whose max_len counts interactions, with max_len in tokens.

        ValueError for an encoder that cannot keep candidates from seeing each other.
        """
        if model.kind not in ("hstu", "ultra_hstu") or model.attention_activation != "silu":
            raise ValueError(
                f"kind is {model.kind!r} with attention_activation {model.attention_activation!r}; ranking needs hstu"
                " or ultra_hstu with silu, whose attention keeps candidates apart"
            )
        # The tokens of the head are its own; how much of them each layer sees is as in the model.
        plan = replace(model.plan(), tokens=self.tokens)
        max_len = plan.tokens_per_interaction * model.max_len + self.max_candidates
        return replace(model, max_len=max_len, **plan.in_tokens(num_targets_max=self.max_candidates))


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingModelConfig(ModelConfig):
    """A model that has a ranking head beside retrieval; weights are exchanged only if that is equal, too."""

    ranking: RankingConfig | LlatteRankingConfig
    """The head: HSTU's, or the ranker of LLaTTE."""

    def hashed_fields(self) -> dict[str, Any]:
        """See ModelConfig; the factors of the tasks' losses may differ."""
        tasks = tuple(replace(task, weight=1.0) for task in self.ranking.tasks)
        fields = ModelConfig.hashed_fields(replace(self, ranking=replace(self.ranking, tasks=tasks)))
        if not self.ranking.surfaces:
            del fields["ranking"]["surfaces"]  # weights from before there was this setting stay what they are
        return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Engagements:
    """Histories of B users in event-time order: items, and what was done with them.

    item_LD: float[L, D]. actions_L: int64[L], a bit for each kind of action. timestamps_ms_L: int64[L], epoch
    milliseconds. offsets: int64[B + 1]. values_L: float[L], NaN where unknown; needed where there are thresholds.
    content_LF: float[L, F], what is known about the items besides, for a ranker that reads it.
    """

    item_LD: Tensor
    actions_L: Tensor
    timestamps_ms_L: Tensor
    offsets: Tensor
    values_L: Tensor | None = None
    content_LF: Tensor | None = None

    def take(self, kept_K: Tensor) -> Engagements:
        """Only these of the L interactions, int64[K] ascending."""
        return Engagements(
            item_LD=self.item_LD.index_select(0, kept_K),
            actions_L=self.actions_L[kept_K],
            timestamps_ms_L=self.timestamps_ms_L[kept_K],
            offsets=torch.searchsorted(kept_K, self.offsets),
            values_L=None if self.values_L is None else self.values_L[kept_K],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionPredictions:
    """Logits of bce tasks and values of mse tasks, a column for each.

    candidates_CK: float[C, K]. interactions_LK: float[L, K], what was to be expected of each interaction of a history
    when its item was met; None of merged tokens, which know their own action, and of a mixture of transducers.
    """

    candidates_CK: Tensor
    interactions_LK: Tensor | None


class RankingNetwork(nn.Module):
    """Histories and candidates, as embeddings of their items, to predictions of every task.

    The item embeddings are the caller's. model: the encoder and its width; its max_len counts interactions.
    """

    def __init__(self, model: ModelConfig, config: RankingConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.max_len = model.max_len
        self.actions = ActionEncoder(
            ActionEncoderConfig(
                num_actions=config.num_actions,
                embedding_dim=model.embedding_dim,
                value_thresholds=config.value_thresholds,
                action_dim=config.action_dim,
                has_surfaces=config.surfaces,
            ),
            generator,
        )
        self.transducers = checked_transducers(model)
        if self.transducers:
            own = [config.encoder_config(part_config(model, one)) for one in self.transducers]
            self.encoders = nn.ModuleList(HSTU(one, generator, num_targets_max=config.max_candidates) for one in own)
            self.max_lens = [part_config(model, one).max_len for one in self.transducers]
            self.fusion = Fusion(len(own), model.embedding_dim, generator)
        else:
            self.encoder = HSTU(config.encoder_config(model), generator, num_targets_max=config.max_candidates)
        self.heads = ActionHeads(
            config.tasks,
            embedding_dim=model.embedding_dim,
            hidden_dim=config.task_hidden_dim,
            generator=generator,
        )

    def forward(
        self,
        engagements: Engagements,
        candidates: Candidates | None = None,
        *,
        dropout: torch.Generator | None = None,
        kernel: KernelName = "auto",
    ) -> ActionPredictions:
        """Candidates see the history and themselves, never each other: each is scored as if it were alone.

        dropout: generator of a training pass, None for inference. ValueError for a history longer than max_len or
        more candidates of a user than max_candidates (where reading the offsets needs no device synchronisation).
        """
        self.check_lengths(engagements, candidates)
        states, interactions_LK = [], None
        for encoder, read in self.readings(engagements):
            sequence = self.tokens(read, candidates)
            x_TD = encoder.hidden_states(
                sequence.x_TD,
                None,
                sequence.offsets,
                # What a token predicts happens at its own time.
                (sequence.timestamps_ms_T, sequence.timestamps_ms_T),
                places_L=sequence.places(),
                num_targets_B=sequence.num_targets_B,
                dropout=dropout,
                kernel=kernel,
            )
            states.append(x_TD.index_select(0, sequence.candidate_positions_C))
            if self.config.tokens == "interleaved" and not self.transducers:
                interactions_LK = self.predict(x_TD.index_select(0, sequence.item_positions_L))
        return ActionPredictions(candidates_CK=self.predict(self.fused(states)), interactions_LK=interactions_LK)

    def readings(self, engagements: Engagements) -> list[tuple[HSTU, Engagements]]:
        """Each encoder, and what it reads of the histories: all, or what is its transducer's own."""
        if not self.transducers:
            return [(self.encoder, engagements)]
        found = []
        for transducer, max_len, encoder in zip(self.transducers, self.max_lens, self.encoders, strict=True):
            assert isinstance(encoder, HSTU), "made by this class"
            own_L = reads(transducer, max_len, engagements.actions_L, engagements.offsets)
            found.append((encoder, engagements.take(own_L.nonzero().flatten())))
        return found

    def fused(self, states: Sequence[Tensor]) -> Tensor:
        """float[P, D], of what each encoder gave at the same candidates."""
        if not self.transducers:
            return states[0]
        normed = [functional.layer_norm(x_PD, x_PD.shape[1:], eps=NORM_EPS) for x_PD in states]
        fused_PD: Tensor = self.fusion(normed)
        return fused_PD

    def loss(
        self,
        predictions: ActionPredictions,
        *,
        candidates: ActionLabels | None = None,
        interactions: ActionLabels | None = None,
    ) -> Tensor:
        """Scalar: each task's mean loss over all that is labelled, weighted and summed (``ActionHeads.loss``).

        candidates, interactions: from ``heads.labels``; None: not learned from. ValueError for labels of interactions
        whose tokens are merged: to learn from one, pass it as a candidate behind the history before it.
        """
        if interactions is not None and predictions.interactions_LK is None:
            raise ValueError(
                "interactions have labels, but merged tokens and those of transducers predict nothing of them: pass"
                " them as candidates"
            )
        pairs = [
            (predicted, labels)
            for predicted, labels in (
                (predictions.candidates_CK, candidates),
                (predictions.interactions_LK, interactions),
            )
            if predicted is not None and labels is not None
        ]
        if not pairs:
            raise ValueError("there are no labels: pass candidates, interactions or both")
        return self.heads.loss(
            torch.cat([predicted for predicted, _ in pairs]),
            ActionLabels(
                values_PK=torch.cat([labels.values_PK for _, labels in pairs]),
                labelled_PK=torch.cat([labels.labelled_PK for _, labels in pairs]),
            ),
        )

    def tokens(self, engagements: Engagements, candidates: Candidates | None) -> TokenSequence:
        """What the encoder reads: histories, and candidates behind them."""
        history = Interactions(
            item_LD=engagements.item_LD,
            action_LD=self.actions(engagements.actions_L, engagements.values_L),
            timestamps_ms_L=engagements.timestamps_ms_L,
            offsets=engagements.offsets,
        )
        if self.config.tokens == "interleaved":
            return interleaved(history, candidates)
        return merged(history, candidates, self.actions.no_action())

    def candidate_tokens(self, item_CD: Tensor) -> Tensor:
        """float[C, D]: what the encoder reads of candidates, as ``tokens`` puts them behind histories."""
        return item_CD + self.actions.no_action() if self.config.tokens == "merged" else item_CD

    def predict(self, x_PD: Tensor) -> Tensor:
        """float[P, K], from the encoder's output at tokens that name an item and know nothing of the action on it."""
        # The layers add up without bound; the heads read directions, at the scale they start out for.
        predictions_PK: Tensor = self.heads(functional.layer_norm(x_PD, x_PD.shape[1:], eps=NORM_EPS))
        return predictions_PK

    def check_lengths(self, engagements: Engagements, candidates: Candidates | None) -> None:
        """ValueError for a history or a row of candidates that is too long; on the CPU, where reading costs nothing."""
        check_longest("interactions", engagements.offsets, "max_len", self.max_len)
        if candidates is not None:
            check_longest("candidates", candidates.offsets, "max_candidates", self.config.max_candidates)


def check_longest(what: str, offsets: Tensor, setting: str, most: int) -> None:
    """ValueError for a row longer than a setting allows; on the CPU, where reading offsets costs nothing."""
    lengths_B = offsets.diff()
    if offsets.device.type == "cpu" and lengths_B.numel() and int(lengths_B.max()) > most:
        raise ValueError(f"a user has {int(lengths_B.max())} {what}; {setting} is {most}")


__all__ = [
    "ActionPredictions",
    "Engagements",
    "RankingConfig",
    "RankingModelConfig",
    "RankingNetwork",
    "check_longest",
]
