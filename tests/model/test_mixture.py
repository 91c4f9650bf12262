"""A mixture of transducers: each reads its own interactions, and what is fused is what each would give alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.batch import HistoryBatch, Targets
from model.config import LossConfig, ModelConfig
from model.encoder import build_encoder
from model.learning import supervised_pass
from model.mixture import TransducerMixture, reads
from model.ranking_model import with_ranking_head
from model.ranking_settings import RankingSettings
from model.recommender import Recommender
from model.stochastic_length import StochasticLength, shortened
from model.token_hstu import Acts, TokenHSTU
from model.transducers import Transducer, part_config, read_by, with_action_bits
from tests.model.test_hstu import LENGTHS, OFFSETS, RESEARCH, inputs, seeded
from tests.model.weights import far_from_start

ACTIONS = ("view", "click", "like", "purchase")
VIEWS = Transducer(name="views", actions=("view", "click"), max_len=4)
DEEDS = Transducer(name="deeds", actions=("purchase",), num_layers=1)
MIXED = with_action_bits(replace(RESEARCH, transducers=(VIEWS, DEEDS)), ACTIONS)
FORMS: dict[str, ModelConfig] = {
    "items": MIXED,
    "merged": replace(MIXED, tokens="merged", value_thresholds=(0.5,)),
    "ultra": replace(
        MIXED,
        kind="ultra_hstu",
        local_attn_len=1,
        global_attn_len=1,
        truncated_len=3,
        truncated_hop=2,
        tokens="interleaved",
        relative_bias=True,
    ),
}
every_form = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())
DONE = torch.tensor([1, 8, 4, 9, 8, 1, 2, 4, 1, 8, 2, 1, 1, 3])
"""Of the positions of ``inputs``: rows of 4, 0, 1 and 9."""


def acts() -> Acts:
    return Acts(actions_L=DONE.clone(), values_L=torch.rand(len(DONE), generator=seeded(5)))


def built(config: ModelConfig) -> TransducerMixture:
    encoder = far_from_start(build_encoder(config, seeded()))
    assert isinstance(encoder, TransducerMixture)
    return encoder


def one_at_a_time(mixture: TransducerMixture) -> Tensor:
    """u_LD of ``inputs`` and ``acts``: at every position, the parts on what each reads, one row and part at a time."""
    item_LD, known_L, offsets, (times_L, asked_L) = inputs()
    done, rows = acts(), []
    for start, end in itertools.pairwise(offsets.tolist()):
        states_TnD = []
        for number, (transducer, part) in enumerate(zip(mixture.transducers, mixture.encoders(), strict=True)):
            own = [at for at in range(start, end) if int(DONE[at]) & transducer.mask]
            while len(own) > part.config.max_len:
                own = own[max(1, part.config.max_len // 8) :]
            at_K = torch.tensor(own, dtype=torch.int64)
            u_KD = torch.empty(0, item_LD.shape[1]).double()
            if own:
                read = (item_LD[at_K], known_L[at_K], torch.tensor([0, len(own)]), (times_L[at_K], asked_L[at_K]))
                u_KD = part(*read, acts=done.take(at_K)) if isinstance(part, TokenHSTU) else part(*read)
            newest = [sum(one <= at for one in own) - 1 for at in range(start, end)]
            absent_D = mixture.fusion.absent_TD[number]
            states_TnD.append([u_KD[place] if place >= 0 else absent_D for place in newest])
        rows += [torch.cat(states) @ mixture.fusion.weight for states in zip(*states_TnD, strict=True)]
    u_LD = torch.stack(rows)
    return u_LD / u_LD.square().sum(1, keepdim=True).sqrt()


@every_form
def test_states_and_gradients_are_those_of_each_transducer_on_its_own_interactions(config: ModelConfig) -> None:
    mixture = built(config)
    got, want = mixture(*inputs(), acts=acts()), one_at_a_time(mixture)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=seeded(3))
    parameters = {name: one for name, one in mixture.named_parameters() if not name.endswith("dummy_KE")}
    gradients = torch.autograd.grad(got, list(parameters.values()), upstream)
    expected = torch.autograd.grad(want, list(parameters.values()), upstream)
    for name, gradient, of_each in zip(parameters, gradients, expected, strict=True):
        assert bool(of_each.any()), f"{name} changes nothing"
        torch.testing.assert_close(gradient, of_each, atol=1e-10, rtol=1e-9, msg=name)


@every_form
def test_a_state_sees_nothing_of_what_comes_after_it_nor_what_was_done_with_it(config: ModelConfig) -> None:
    mixture = built(config)
    item_LD, known_L, offsets, times_ms = inputs()
    before = mixture(item_LD, torch.ones_like(known_L), offsets, times_ms, acts=acts())
    index, other = 9, acts()
    other.actions_L[index] = 6  # another transducer reads it now
    after = mixture(item_LD, torch.ones_like(known_L), offsets, times_ms, acts=other)
    changed = ((after - before).abs().amax(1) > 1e-9).nonzero().flatten().tolist()
    assert changed
    assert min(changed) == index


def test_a_user_without_events_of_a_kind_and_one_without_any_have_a_state() -> None:
    mixture = built(MIXED)
    item_LD, known_L, offsets, times_ms = inputs()
    read = acts()
    read.actions_L[:] = 4  # nobody's
    u_LD = mixture(item_LD, known_L, offsets, times_ms, acts=read)
    torch.testing.assert_close(u_LD.norm(dim=1), torch.ones(sum(LENGTHS)).double())
    torch.testing.assert_close(u_LD, u_LD[:1].expand_as(u_LD), msg="nothing was read, so all are alike")
    read.actions_L[5:] = 8
    only_deeds = mixture(item_LD, known_L, offsets, times_ms, acts=read)
    assert not torch.allclose(only_deeds[5:], u_LD[5:], atol=1e-3)
    none = torch.empty(0, dtype=torch.int64)
    nobody = Acts(actions_L=none, values_L=none.double())
    empty = mixture(item_LD[:0], none.bool(), torch.zeros(3, dtype=torch.int64), (none, none), acts=nobody)
    assert empty.shape == (0, RESEARCH.embedding_dim)


def test_what_was_done_is_not_told_in_a_session_which_every_transducer_reads() -> None:
    mixture = built(MIXED)
    read = Acts(actions_L=torch.zeros_like(DONE), values_L=acts().values_L)
    u_LD = mixture(*inputs(), acts=read)
    assert not torch.allclose(u_LD[0], u_LD[3], atol=1e-3)


@every_form
def test_every_parameter_is_learned_also_from_shortened_histories(config: ModelConfig) -> None:
    recommender = Recommender(config)
    recommender.items.admit(np.arange(7))
    with torch.no_grad():
        recommender.items.weight[:7] = torch.randn(7, config.embedding_dim, generator=seeded(4))
    num = len(DONE)
    batch = HistoryBatch(
        rows_L=torch.arange(num) % 7,
        timestamps_ms_L=torch.arange(num) * 60_000,
        query_times_ms_L=torch.arange(num) * 60_000 + 60_000,
        offsets=OFFSETS,
        actions_L=DONE,
        values_L=acts().values_L,
    )
    targets = Targets(positions_P=torch.arange(num), rows_P=torch.arange(1, num + 1) % 7)
    learned = supervised_pass(recommender, batch, targets, LossConfig(), generator=seeded())
    learned.backward()
    for name, parameter in recommender.encoder.named_parameters():
        if not name.endswith("dummy_KE"):
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name
    newest = Targets(positions_P=torch.tensor([13]), rows_P=torch.tensor([1]))
    rule = StochasticLength(alpha=1.2, max_len=9)
    short, moved = shortened(batch, newest, rule, generator=seeded(1))
    assert short.num_positions < num
    assert recommender.encode(short)[moved.positions_P].isfinite().all()


@pytest.mark.parametrize("max_len", [1, 5, 16, 17, 30])
def test_packed_and_single_histories_are_read_alike(max_len: int) -> None:
    """The newest of a transducer's own, at most max_len, from a start that moves in hops of an eighth."""
    transducer, rng = MIXED.transducers[1], np.random.default_rng(max_len)
    rows = [rng.integers(0, 16, length).tolist() for length in (0, 1, *rng.integers(2, 120, 30))]
    offsets = torch.tensor([0, *itertools.accumulate(len(row) for row in rows)])
    got_L = reads(transducer, max_len, torch.tensor([act for row in rows for act in row]).long(), offsets)
    for row, (start, end) in zip(rows, itertools.pairwise(offsets.tolist()), strict=True):
        own = [place for place, act in enumerate(row) if act == 0 or act & 8]
        while len(own) > max_len:
            own = own[max(1, max_len // 8) :]
        assert got_L[start:end].nonzero().flatten().tolist() == own
        assert read_by(transducer, max_len, np.array(row, np.int64)).tolist() == own


# Settings


@pytest.mark.parametrize(
    ("transducers", "says"),
    [
        ([{"name": "a"}], "transducers needs name and actions of each"),
        ([{"name": "a", "actions": ["view"], "length": 3}], "transducers has the key 'length', which does not exist"),
        ([{"name": "a", "actions": []}], "transducers: a names no actions, so it would read nothing"),
        ([VIEWS, VIEWS], "each with a name of its own"),
        ([replace(VIEWS, max_len=10)], "transducers: max_len of views is 10; it must be between 1 and max_len"),
        ([replace(DEEDS, num_layers=0)], "transducers: num_layers of deeds is 0"),
    ],
)
def test_transducers_that_cannot_be_meant_are_refused(transducers: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(RESEARCH, transducers=transducers)


def test_a_transducer_of_an_action_that_is_not_declared_is_refused() -> None:
    config = replace(RESEARCH, transducers=(VIEWS, DEEDS))
    with pytest.raises(
        ValueError, match=r"model.transducers: deeds reads purchase; declared in events.actions are view"
    ):
        with_ranking_head(config, RankingSettings(), ("view", "click"))
    with pytest.raises(ValueError, match="the actions of views have no bits yet"):
        build_encoder(config, seeded())
    with pytest.raises(ValueError, match="transducers are for hstu and ultra_hstu, not for gru"):
        replace(config, kind="gru")


def test_bits_decide_which_weights_fit_and_names_do_not() -> None:
    own = MIXED.config_hash()
    assert own != RESEARCH.config_hash()
    renamed = replace(MIXED, transducers=(replace(MIXED.transducers[0], name="seen"), MIXED.transducers[1]))
    assert renamed.config_hash() == own
    changes: list[dict[str, Any]] = [{"mask": 1}, {"max_len": 5}, {"num_layers": 1}]
    for changed in changes:
        other = replace(MIXED, transducers=(replace(MIXED.transducers[0], **changed), MIXED.transducers[1]))
        assert other.config_hash() != own, changed
    assert [one.mask for one in MIXED.transducers] == [3, 8]


def test_limits_that_a_transducer_does_not_reach_are_none() -> None:
    model = replace(
        RESEARCH, num_layers=4, truncated_layers=3, truncated_len=6, truncated_hop=5, transducers=(VIEWS, DEEDS)
    )
    views, deeds = (part_config(model, one) for one in model.transducers)
    assert (views.max_len, views.plan().num_truncated) == (4, 0)
    assert (deeds.num_layers, deeds.plan().num_truncated, deeds.plan().truncated_len) == (1, 0, 6)
