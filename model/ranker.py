"""Which ranker a configuration asks for, and what all of them are handed."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.implementations import KernelName
from model.config import ModelConfig
from model.item_table import CONTENT_DIM
from model.llatte_ranker import LlatteRanker
from model.llatte_ranking_config import LlatteRankingConfig
from model.ranking_network import ActionPredictions, Engagements, RankingModelConfig, RankingNetwork
from model.ranking_scores import candidates_of, micro_batches, score_candidates
from model.sequence import Candidates
from model.upstream_input import UpstreamVectors

Ranker = RankingNetwork | LlatteRanker


def ranker_of(config: RankingModelConfig, generator: torch.Generator) -> Ranker:
    """The ranker of ``config.ranking``; its weights depend on the configuration and the generator's state only."""
    if isinstance(config.ranking, LlatteRankingConfig):
        return LlatteRanker(config, config.ranking, generator)
    return RankingNetwork(config, config.ranking, generator)


def content_dim_of(config: ModelConfig) -> int:
    """C: how much of what is known about items besides their interactions the model reads."""
    ranking = config.ranking if isinstance(config, RankingModelConfig) else None
    return CONTENT_DIM if isinstance(ranking, LlatteRankingConfig) and ranking.llatte.content else 0


def predict(
    ranker: Ranker,
    engagements: Engagements,
    candidates: Candidates,
    upstream: UpstreamVectors | None,
    *,
    dropout: torch.Generator | None = None,
    kernel: KernelName = "auto",
) -> ActionPredictions:
    """A pass over at most max_candidates of a user; see the rankers' ``forward``. HSTU's reads no vectors."""
    if isinstance(ranker, LlatteRanker):
        found: ActionPredictions = ranker(engagements, candidates, upstream, dropout=dropout, kernel=kernel)
    else:
        found = ranker(engagements, candidates, dropout=dropout, kernel=kernel)
    return found


@torch.no_grad()
def rank_candidates(
    ranker: Ranker, engagements: Engagements, candidates: Candidates, upstream: UpstreamVectors | None = None
) -> Tensor:
    """float[C, K]: logits of bce tasks, values of mse tasks, of any number of candidates, each as if it were alone.

    The histories are read once. ValueError for one longer than max_len.
    """
    if not isinstance(ranker, LlatteRanker):
        return score_candidates(ranker, engagements, candidates)
    if upstream is None:
        upstream = UpstreamVectors.missing(engagements.offsets.shape[0] - 1, ranker.config.upstream_width)
    rows, user_BH = ranker.read(
        engagements, candidates.request_times_ms_B, upstream, asked_on_B=candidates.request_surfaces_B
    )
    scores_CK = candidates.item_CD.new_empty(candidates.item_CD.shape[0], len(ranker.config.tasks))
    for part in micro_batches(candidates.offsets, ranker.config.max_candidates):
        scores_CK[part.places_M] = ranker.behind(rows, user_BH, candidates_of(candidates, part))
    return scores_CK


def rank_nothing(ranker: Ranker, width: int) -> None:
    """Rank once, aside: what the numerical library sets up at first use is not the first caller's wait.

    width: of item embeddings.
    """
    content = torch.zeros(2, ranker.tokens.content_dim) if isinstance(ranker, LlatteRanker) else None
    history = Engagements(
        item_LD=torch.zeros(1, width),
        actions_L=torch.zeros(1, dtype=torch.int64),
        timestamps_ms_L=torch.tensor([0]),
        offsets=torch.tensor([0, 1]),
        values_L=torch.zeros(1),
        content_LF=None if content is None else content[:1],
    )
    shown = Candidates(
        item_CD=torch.zeros(2, width),
        request_times_ms_B=torch.tensor([1]),
        offsets=torch.tensor([0, 2]),
        content_CF=content,
    )
    rank_candidates(ranker, history, shown)
