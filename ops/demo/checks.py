"""What the demo proves at its end: the truth is the recorded file, everything else is compared with it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
import numpy as np

from backtest.replay import RecordedStream
from feature_store.ids import event_keys
from feature_store.records import StoreTotals
from feature_store.store import FeatureStore
from ops.demo.state import Sample
from ops.demo.watch import BackgroundLoad, recommend
from ops.supervisor import ChildStatus
from serving.messages import Recommendation

_MODULUS: Final = 1 << 64
_COMPARED_USERS: Final = 20
_USERS_PER_READ: Final = 4_000
_SCORE_TOLERANCE: Final = 1e-4
"""The workers batch differently, so sums may differ in their last bits."""


@dataclass(frozen=True, slots=True)
class Check:
    """One claim, whether it holds, and the figures."""

    name: str
    is_ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Truth:
    """What must be stored and learned: number of events, and the sum of their keys modulo 2^64."""

    num_interactions: int
    fingerprint: int

    def plus(self, keys: Sequence[int]) -> Truth:
        """With more events."""
        return Truth(self.num_interactions + len(keys), (self.fingerprint + sum(keys)) % _MODULUS)


def truth_of(recorded: RecordedStream, event_id_prefix: str) -> Truth:
    """Of a recorded stream, computed from the file alone."""
    keys = event_keys(f"{event_id_prefix}-{row}" for row in recorded.row.tolist())
    return Truth(len(keys), int(np.add.reduce(keys, dtype=np.uint64)))


def check_histories(truth: Truth, totals: StoreTotals) -> Check:
    """The store holds exactly the events of the truth."""
    is_ok = (totals.num_interactions, totals.fingerprint) == (truth.num_interactions, truth.fingerprint)
    return Check(
        "histories equal the recorded stream",
        is_ok,
        f"{totals.num_interactions:,} stored of {truth.num_interactions:,}, {totals.num_users:,} users, "
        f"fingerprint {totals.fingerprint:016x} {'equals' if is_ok else 'should be'} {truth.fingerprint:016x}",
    )


def check_learned(totals: StoreTotals, trainer: Mapping[str, Any]) -> Check:
    """The trainer has learned from every accepted interaction exactly once."""
    learned, fingerprint = int(trainer["interactions"]), int(trainer["fingerprint"])
    parts = {name: int(trainer[name]) for name in ("supervised", "first", "out_of_reach", "quarantined")}
    is_ok = (
        (learned, fingerprint) == (totals.num_accepted, totals.accepted_fingerprint)
        and sum(parts.values()) == learned
        and parts["quarantined"] == 0
    )
    return Check(
        "each interaction was learned from exactly once",
        is_ok,
        f"{learned:,} in the trainer's account: {parts['supervised']:,} predicted, then learned; {parts['first']:,} "
        f"first of their user; {parts['out_of_reach']:,} too late to predict; {parts['quarantined']:,} set aside",
    )


def check_served(truth: Truth, sample: Sample) -> Check:
    """The weights in service have learned from everything."""
    learned = [worker.learned_interactions for worker in sample.workers]
    versions = ", ".join(str(worker.version) for worker in sample.workers)
    return Check(
        "the weights in service contain every interaction",
        all(one == truth.num_interactions for one in learned),
        f"{', '.join(f'{one or 0:,}' for one in learned)} of {truth.num_interactions:,}; versions {versions}",
    )


def check_vectors(store: FeatureStore, *, model: str, width: int, max_age_ms: int) -> Check:
    """Everybody who was there lately has a vector, all of one version, made of the whole history; reads all of them."""
    states, num_users, num_right = store.user_states, 0, 0
    versions: set[int] = set()
    since_ms, after_user = max(states.watermark_ms() - max_age_ms, 0), -1
    while len(users := states.users_after(after_user, limit=_USERS_PER_READ, active_since_ms=since_ms)):
        found = states.newest(model, users, width=width)
        next_seq = store.read_current(users, max_len=1).next_seq
        num_users, after_user = num_users + len(users), int(users[-1])
        num_right += int((found.is_there & (found.next_seq == next_seq)).sum())
        versions |= set(found.version[found.is_there].tolist())
    return Check(
        "every user's vector knows the whole history",
        num_right == num_users > 0 and len(versions) == 1,
        f"{num_right:,} of {num_users:,} users of the last {max_age_ms / 86_400_000:g} days; "
        f"version{'s' if len(versions) != 1 else ''} {', '.join(map(str, sorted(versions))) or 'none'}",
    )


def check_requests(load: BackgroundLoad, sample: Sample) -> Check:
    """No request failed, at the caller or in a worker."""
    at_workers = sum(worker.num_errors + worker.num_rejected for worker in sample.workers)
    failures = ", ".join(f"{count} × {what}" for what, count in load.failures.items())
    return Check(
        "no request failed",
        load.failures.total() == 0 and at_workers == 0 and load.num_answered > 0,
        f"{load.num_answered:,} background requests answered, {load.num_fallback:,} of them by popularity "
        f"(before the first weights know the user's films); failed: {failures or 'none'}",
    )


async def check_answers(
    client: httpx.AsyncClient, urls: Sequence[str], user_ids: Sequence[int | str], load: BackgroundLoad
) -> Check:
    """No answer mixed versions: none contradicts another, and workers of one version answer alike."""
    chosen = random.Random(7).sample(sorted({int(user_id) for user_id in user_ids}), _COMPARED_USERS)
    differing = []
    for user_id in chosen:
        first, *others = await asyncio.gather(*(recommend(client, url, user_id) for url in urls))
        differing += [user_id for other in others if not _alike(first, other)]
    contradictions = load.contradictions[:1]
    return Check(
        "no answer mixed versions",
        not differing and not contradictions,
        f"{len(chosen) - len(differing)} of {len(chosen)} users get the same answer from every worker; "
        f"contradictions in {load.num_answered:,} answers: {contradictions[0] if contradictions else 'none'}",
    )


def _alike(one: Recommendation, other: Recommendation) -> bool:
    """Same version, and the same scores down the list (equal scores may change places)."""
    if one.snapshot_version != other.snapshot_version or len(one.items) != len(other.items):
        return False
    ours, theirs = (np.array([item.score for item in answer.items], float) for answer in (one, other))
    return bool(np.allclose(ours, theirs, rtol=_SCORE_TOLERANCE, atol=_SCORE_TOLERANCE))


def check_refusals(ingest: Mapping[str, Any]) -> Check:
    """Nothing went to dead letters."""
    refused = ingest["refused"]
    words = ", ".join(f"{count} × {reason}" for reason, count in refused.items())
    return Check("no event was refused", not refused, words or "no dead letters")


def check_titles(num_stored: int, num_published: int) -> Check:
    """Item metadata arrived."""
    return Check(
        "every title arrived", num_stored == num_published, f"{num_stored:,} of {num_published:,} items stored"
    )


def check_processes(children: Sequence[ChildStatus]) -> Check:
    """All are up. One that was killed on the way and came back is told, but fails nothing: the rest is still true."""
    again = [f"{child.name} was started again {child.num_starts - 1}×" for child in children if child.num_starts > 1]
    down = [f"{child.name} is {child.state}" for child in children if child.state != "running"]
    return Check("every process is up", not down, "; ".join([*down, *again]) or "each was started once")
