"""Absorbed attention is the textbook's, rows read together are rows read alone, trimming drops what it says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.llatte import LatentAttention, LlatteEncoder, newest_of_rows
from model.llatte_config import LlatteConfig
from model.llatte_tokens import age_bucket
from tests.model.weights import far_from_start

CONFIG = LlatteConfig(
    width=6, num_layers=3, num_heads=2, latent_dim=5, head_dim=3, ffn_dim=7, num_queries=2, max_len=8, trimming="full"
)
QUERIES = 2
LENGTHS = [2, 10, 3, 7]
"""Tokens of a row, query tokens among them: the first row is a user without a history."""
trimmings = pytest.mark.parametrize("trimming", ["full", "pyramid", "cross_attention"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def tokens_of(num: int, seed: int = 1) -> Tensor:
    return torch.randn(num, CONFIG.width, dtype=torch.float64, generator=seeded(seed))


def encoder_of(trimming: str) -> LlatteEncoder:
    return far_from_start(LlatteEncoder(replace(CONFIG, trimming=trimming), seeded()))  # type: ignore[arg-type]


def test_absorbed_attention_equals_the_form_with_keys_and_values_of_every_head() -> None:
    attention = far_from_start(LatentAttention(CONFIG, seeded()))
    x, offsets = tokens_of(9), torch.tensor([0, 9])
    pull, gradients = tokens_of(9, seed=2), []
    for form in (
        lambda: attention(x, attention.keys(x), offsets, offsets),
        lambda: attention.unabsorbed(x),
    ):
        found = form()
        gradients.append(torch.autograd.grad((found * pull).sum(), list(attention.parameters())))
        torch.testing.assert_close(found, attention.unabsorbed(x), atol=1e-12, rtol=0)
    names = [name for name, _ in attention.named_parameters()]
    for name, absorbed, unabsorbed in zip(names, *gradients, strict=True):
        torch.testing.assert_close(absorbed, unabsorbed, atol=1e-12, rtol=1e-9, msg=name)


@trimmings
def test_a_row_is_read_as_if_it_were_alone(trimming: str) -> None:
    encoder, x = encoder_of(trimming), tokens_of(sum(LENGTHS))
    together = encoder.read(x, offsets_of(LENGTHS), num_queries=QUERIES).queries_BQD
    for number, row in enumerate(torch.split(x, LENGTHS)):
        alone = encoder.read(row, offsets_of([len(row)]), num_queries=QUERIES).queries_BQD
        torch.testing.assert_close(alone[0], together[number], atol=1e-12, rtol=0)


@trimmings
def test_candidates_together_are_read_as_each_alone(trimming: str) -> None:
    encoder, numbers = encoder_of(trimming), [3, 0, 1, 5]
    rows = encoder.read(tokens_of(sum(LENGTHS)), offsets_of(LENGTHS), num_queries=QUERIES)
    x = tokens_of(sum(numbers), seed=3)
    together = encoder.behind(rows, x, offsets_of(numbers))
    place = 0
    for user, number in enumerate(numbers):
        for _ in range(number):
            alone = encoder.behind(rows, x[place : place + 1], offsets_of([int(at == user) for at in range(4)]))
            torch.testing.assert_close(alone[0], together[place], atol=1e-12, rtol=0)
            place += 1


def test_a_candidate_is_read_as_one_more_query_token() -> None:
    encoder, x = encoder_of("full"), tokens_of(9)
    behind = encoder.behind(encoder.read(x[:8], offsets_of([8]), num_queries=2), x[8:], offsets_of([1]))
    as_query = encoder.read(x, offsets_of([9]), num_queries=1).queries_BQD
    torch.testing.assert_close(behind, as_query[0], atol=1e-12, rtol=0)


def test_the_full_schedule_computes_no_less_than_layers_over_every_token() -> None:
    """The last layer leaves out tokens that nothing reads: the result is that of computing them all."""
    encoder, x, offsets = encoder_of("full"), tokens_of(sum(LENGTHS)), offsets_of(LENGTHS)
    found, every = encoder.read(x, offsets, num_queries=QUERIES).queries_BQD, x
    for layer in encoder.layers:
        every = layer(every, layer.attention.keys(every), offsets, offsets)  # type: ignore[operator, union-attr]
    index, _ = newest_of_rows(offsets, QUERIES, num_values=len(x))
    torch.testing.assert_close(found.flatten(0, 1), every[index], atol=1e-12, rtol=0)


def test_layers_keep_as_many_interactions_as_the_schedule_says() -> None:
    kept = {name: replace(CONFIG, trimming=name).kept_lens() for name in ("full", "pyramid", "cross_attention")}
    assert kept == {"full": (8, 8, 0), "pyramid": (4, 2, 0), "cross_attention": (0, 0, 0)}
    for name, want in {"full": [22, 22, 22], "pyramid": [22, 2 + 6 + 3 + 6, 2 + 4 + 3 + 4]}.items():
        rows = encoder_of(name).read(tokens_of(sum(LENGTHS)), offsets_of(LENGTHS), num_queries=QUERIES)
        assert [len(values) for values, _ in rows.kept] == want


@trimmings
def test_the_oldest_interaction_reaches_the_query_tokens(trimming: str) -> None:
    encoder, x = encoder_of(trimming), tokens_of(10)
    before = encoder.read(x, offsets_of([10]), num_queries=QUERIES).queries_BQD
    x[0] += 1
    after = encoder.read(x, offsets_of([10]), num_queries=QUERIES).queries_BQD
    assert ((after - before).abs() > 1e-6).any()


def test_ages_fall_into_two_buckets_for_each_doubling() -> None:
    ages_s = torch.tensor([-5.0, 0.0, 0.3, 1.0, 3.0, 7.0, 3600.0, 86_400.0, 1e12])
    assert age_bucket((ages_s * 1000).long()).tolist() == [0, 0, 0, 2, 4, 6, 23, 32, 63]


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="trimming is 'none'; it must be full or pyramid or cross_attention"):
        replace(CONFIG, trimming="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads is 0"):
        replace(CONFIG, num_heads=0)
