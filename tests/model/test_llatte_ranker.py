"""Candidates together score as each alone, with the user's vector, without it, and with one that cannot be read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.action_heads import ActionTask
from model.config import ModelConfig
from model.llatte_config import LlatteSettings
from model.llatte_ranker import LlatteRanker
from model.llatte_ranking_config import LlatteRankingConfig
from model.ranker import rank_candidates
from model.ranking_model import with_ranking_head
from model.ranking_network import Engagements, RankingModelConfig
from model.ranking_settings import RankingSettings
from model.recommender import Recommender
from model.sequence import Candidates
from model.upstream_input import UpstreamVectors
from tests.model.weights import far_from_start

WIDTH, VECTOR = 8, 6
START_MS = 1_700_000_000_000
TASKS = (ActionTask(name="like", kind="bce", action_bit=0), ActionTask(name="watch", kind="mse"))
SETTINGS = LlatteSettings(
    num_heads=2,
    latent_dim=5,
    head_dim=4,
    ffn_dim=10,
    readout_rank=4,
    sequence_dim=6,
    backbone_dim=12,
    upstream_dropout=0.0,
)
CONFIG = LlatteRankingConfig(
    tasks=TASKS,
    num_actions=3,
    llatte=SETTINGS,
    upstream_width=VECTOR,
    value_thresholds=(0.5,),
    task_hidden_dim=6,
    max_candidates=4,
)
MODEL = ModelConfig(embedding_dim=WIDTH, max_len=7)
LENGTHS = [3, 0, 1, 7]
trimmings = pytest.mark.parametrize("trimming", ["full", "pyramid", "cross_attention"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ranker_of(trimming: str = "pyramid", *, dropout: float = 0.0, surfaces: bool = False) -> LlatteRanker:
    settings = replace(SETTINGS, trimming=trimming, upstream_dropout=dropout)  # type: ignore[arg-type]
    return far_from_start(LlatteRanker(MODEL, replace(CONFIG, llatte=settings, surfaces=surfaces), seeded()))


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def engagements_of(lengths: list[int] = LENGTHS) -> Engagements:
    generator, num = seeded(2), sum(lengths)
    return Engagements(
        item_LD=torch.randn(num, WIDTH, dtype=torch.float64, generator=generator),
        actions_L=torch.randint(8, (num,), generator=generator),
        timestamps_ms_L=START_MS + torch.randint(10**7, (num,), generator=generator).cumsum(0),
        offsets=offsets_of(lengths),
        values_L=torch.rand(num, dtype=torch.float64, generator=generator),
    )


def candidates_of(numbers: list[int]) -> Candidates:
    generator = seeded(3)
    return Candidates(
        item_CD=torch.randn(sum(numbers), WIDTH, dtype=torch.float64, generator=generator),
        request_times_ms_B=START_MS + 10**9 + torch.randint(10**9, (len(numbers),), generator=generator),
        offsets=offsets_of(numbers),
    )


def vectors_of(ages_s: list[float]) -> UpstreamVectors:
    return UpstreamVectors(
        vector_BW=torch.randn(len(ages_s), VECTOR, generator=seeded(4)), age_s_B=torch.tensor(ages_s)
    )


VECTORS = vectors_of([60.0, 3_600.0, float("nan"), 0.0])


@trimmings
@pytest.mark.parametrize("number", [1, 2, 4])
def test_candidates_together_score_as_each_alone(trimming: str, number: int) -> None:
    ranker, candidates = ranker_of(trimming), candidates_of([number] * 4)
    together = ranker(engagements_of(), candidates, VECTORS).candidates_CK.view(4, number, 2)
    for place in range(number):
        alone = replace(candidates, item_CD=candidates.item_CD[place::number], offsets=torch.arange(5))
        found = ranker(engagements_of(), alone, VECTORS).candidates_CK
        torch.testing.assert_close(found, together[:, place], atol=1e-10, rtol=0)


@trimmings
def test_any_number_of_candidates_is_scored_as_in_passes_of_their_own(trimming: str) -> None:
    ranker, candidates = ranker_of(trimming), candidates_of([9, 0, 1, 4])
    scores = rank_candidates(ranker, engagements_of(), candidates, VECTORS)
    place = 0
    for user, number in enumerate([9, 0, 1, 4]):
        for _ in range(number):
            one = replace(
                candidates,
                item_CD=candidates.item_CD[place : place + 1],
                offsets=offsets_of([int(at == user) for at in range(4)]),
            )
            expected = ranker(engagements_of(), one, VECTORS).candidates_CK[0]
            torch.testing.assert_close(scores[place], expected, atol=1e-10, rtol=0)
            place += 1


@pytest.mark.parametrize("what", ["item", "action", "value", "surface", "time", "request", "place", "vector", "age"])
def test_scores_depend_on_all_that_is_read(what: str) -> None:
    ranker, history, candidates = ranker_of(surfaces=True), engagements_of([5]), candidates_of([2])
    vectors = vectors_of([60.0])
    before = ranker(history, candidates, vectors).candidates_CK
    if what == "item":
        history = replace(history, item_LD=history.item_LD.flip(0))
    elif what == "action":
        history = replace(history, actions_L=7 - history.actions_L)
    elif what == "value":
        history = replace(history, values_L=torch.ones(5, dtype=torch.float64) * 0.1)
    elif what == "surface":
        history = replace(history, actions_L=history.actions_L | 3 << 32)
    elif what == "place":
        candidates = replace(candidates, request_surfaces_B=torch.tensor([2]))
    elif what == "time":
        history = replace(history, timestamps_ms_L=history.timestamps_ms_L - 10**9)
    elif what == "request":
        candidates = replace(candidates, request_times_ms_B=candidates.request_times_ms_B + 10**10)
    elif what == "vector":
        vectors = replace(vectors, vector_BW=vectors.vector_BW + 1)
    else:
        vectors = replace(vectors, age_s_B=vectors.age_s_B + 86_400)
    assert (ranker(history, candidates, vectors).candidates_CK - before).abs().max() > 1e-4


def test_where_it_is_asked_for_counts_only_with_surfaces_and_none_is_as_not_told() -> None:
    history, candidates = engagements_of(), candidates_of([2] * 4)
    elsewhere = replace(candidates, request_surfaces_B=torch.tensor([0, 1, 0, 2]))
    for surfaces in (False, True):
        ranker = ranker_of(surfaces=surfaces)
        before, after = (rank_candidates(ranker, history, one, VECTORS).view(4, -1) for one in (candidates, elsewhere))
        moved = ((after - before).abs().amax(1) > 1e-9).tolist()
        assert moved == [False, surfaces, False, surfaces]
        passed = ranker(history, elsewhere, VECTORS).candidates_CK.view(4, -1)
        torch.testing.assert_close(passed, after, atol=1e-10, rtol=0)


def test_a_vector_that_cannot_be_read_counts_as_missing() -> None:
    ranker, history, candidates = ranker_of(), engagements_of(), candidates_of([2] * 4)
    missing = ranker(history, candidates).candidates_CK
    for poison in (float("nan"), float("inf")):
        vectors = vectors_of([60.0] * 4)
        vectors.vector_BW[:, 1] = poison
        assert torch.equal(ranker(history, candidates, vectors).candidates_CK, missing)
    without_age = replace(vectors_of([60.0] * 4), age_s_B=torch.full((4,), torch.inf))
    assert torch.equal(ranker(history, candidates, without_age).candidates_CK, missing)
    scores = ranker(history, candidates, vectors).candidates_CK.sum()
    scores.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in ranker.parameters())


def test_a_poisoned_vector_is_nobody_elses_concern() -> None:
    ranker, history, candidates = ranker_of(), engagements_of(), candidates_of([2] * 4)
    before = ranker(history, candidates, VECTORS).candidates_CK.view(4, 2, 2)
    poisoned = replace(VECTORS, vector_BW=VECTORS.vector_BW.clone())
    poisoned.vector_BW[1] = torch.nan
    after = ranker(history, candidates, poisoned).candidates_CK.view(4, 2, 2)
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert not torch.equal(after[1], before[1])


def test_a_share_of_vectors_is_withheld_in_training_alone() -> None:
    ranker, history, candidates = ranker_of(dropout=0.5), engagements_of([2] * 40), candidates_of([1] * 40)
    vectors = vectors_of([60.0] * 40)
    given, missing = (ranker(history, candidates, one).candidates_CK[:, 0] for one in (vectors, None))
    found = ranker(history, candidates, vectors, dropout=seeded()).candidates_CK[:, 0]
    is_withheld, is_given = torch.isclose(found, missing), torch.isclose(found, given)
    assert (is_withheld ^ is_given).all()
    assert 10 < int(is_withheld.sum()) < 30


def test_it_learns_what_only_the_vector_says_and_does_without_it() -> None:
    """Whether a user likes what is shown is the sign of one number of the vector."""
    torch.manual_seed(0)
    settings = replace(SETTINGS, upstream_dropout=0.2)
    ranker = LlatteRanker(MODEL, replace(CONFIG, llatte=settings, tasks=TASKS[:1]), seeded())
    optimizer, generator = torch.optim.AdamW(ranker.parameters(), lr=1e-2), seeded(5)

    def predicted(with_vectors: bool, dropout: torch.Generator | None) -> tuple[Tensor, Tensor]:
        vectors = UpstreamVectors(
            vector_BW=torch.randn(64, VECTOR, generator=generator), age_s_B=torch.full((64,), 60.0)
        )
        item_CD = 0.02 * torch.randn(64, WIDTH, generator=generator)
        likes = (vectors.vector_BW[:, :1] > 0).float()
        history = Engagements(
            item_LD=torch.zeros(0, WIDTH),
            actions_L=torch.zeros(0, dtype=torch.int64),
            timestamps_ms_L=torch.zeros(0, dtype=torch.int64),
            offsets=torch.zeros(65, dtype=torch.int64),
            values_L=torch.zeros(0),
        )
        shown = Candidates(item_CD=item_CD, request_times_ms_B=torch.full((64,), START_MS), offsets=torch.arange(65))
        return ranker(history, shown, vectors if with_vectors else None, dropout=dropout).candidates_CK, likes

    for _ in range(80):
        logits, likes = predicted(True, generator)
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, likes).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        loss = {
            has_vectors: float(torch.nn.functional.binary_cross_entropy_with_logits(*predicted(has_vectors, None)))
            for has_vectors in (True, False)
        }
    assert loss[True] < 0.35
    assert loss[False] < 0.75  # guessing costs log 2 = 0.69


def test_the_settings_make_it_part_of_the_recommender() -> None:
    settings = RankingSettings(kind="llatte", tasks=("like",), max_candidates=4)
    config = with_ranking_head(MODEL, settings, ("view", "like"), SETTINGS, upstream_width=VECTOR)
    assert isinstance(config, RankingModelConfig)
    recommender = Recommender(config)
    assert isinstance(recommender.ranking, LlatteRanker)
    assert recommender.ranking_parameters().keys() == {
        f"ranking.{n}" for n, _ in recommender.ranking.named_parameters()
    }
    other = with_ranking_head(MODEL, settings, ("view", "like"), SETTINGS, upstream_width=VECTOR + 1)
    assert other.config_hash() != config.config_hash()
    # The encoder of histories may be one whose candidates would see each other: this ranker has its own.
    with_ranking_head(replace(MODEL, kind="gru"), settings, ("view", "like"), SETTINGS)


def test_too_much_is_refused() -> None:
    ranker = ranker_of()
    with pytest.raises(ValueError, match="a user has 8 interactions; max_len is 7"):
        ranker(engagements_of([8]), candidates_of([1]))
    with pytest.raises(ValueError, match="a user has 5 candidates; max_candidates is 4"):
        ranker(engagements_of([1]), candidates_of([5]))
    with pytest.raises(ValueError, match=r"age_s_B \[B\]"):
        UpstreamVectors(vector_BW=torch.zeros(2, VECTOR), age_s_B=torch.zeros(3))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="llatte.upstream_dropout = 1"):
        LlatteSettings(upstream_dropout=1.0)
    with pytest.raises(ValueError, match="llatte.num_layers is 0"):
        LlatteSettings(num_layers=0)
    with pytest.raises(ValueError, match="ranking.kind = 'dlrm': must be hstu or llatte"):
        RankingSettings(kind="dlrm")  # type: ignore[arg-type]


def test_content_is_part_of_tokens_where_it_is_read() -> None:
    ranker = far_from_start(LlatteRanker(MODEL, replace(CONFIG, llatte=replace(SETTINGS, content=True)), seeded()))
    history, candidates = engagements_of([3]), candidates_of([2])
    with pytest.raises(ValueError, match="content_LF is None; these weights read content of 64 numbers"):
        ranker(history, candidates)
    of_history, of_candidates = (torch.randn(n, 64, dtype=torch.float64, generator=seeded(n)) for n in (3, 2))

    def scores(of_history: Tensor, of_candidates: Tensor) -> Tensor:
        shown = replace(candidates, content_CF=of_candidates)
        return rank_candidates(ranker, replace(history, content_LF=of_history), shown)

    before = scores(of_history, of_candidates)
    assert (scores(of_history.flip(0), of_candidates) - before).abs().max() > 1e-4
    changed = of_candidates.clone()
    changed[1] += 1
    assert torch.equal(scores(of_history, changed)[0], before[0])
    assert not torch.equal(scores(of_history, changed)[1], before[1])
