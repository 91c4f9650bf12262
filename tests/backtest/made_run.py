"""A small run, made up: arms whose quality falls with the age of their weights, and a change in the middle."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backtest.run_files import ArmCosts, ArmInfo, RunFolder, RunManifest, RunWriter
from model.ranking import MISS_RANK

T0 = 1_507_161_600_000
"""2017-10-05 00:00 UTC."""
DAY_MS = 86_400_000
NUM_ITEMS = 500
SPANS = {"0": 0, "1m": 60_000, "1h": 3_600_000, "1d": DAY_MS, "never": None}


def _age(number: int) -> int | None:
    return list(SPANS.values())[number]


def arms() -> list[ArmInfo]:
    online = [
        ArmInfo(
            name=f"online-{name}",
            kind="online",
            title=f"Online, published every {name.replace('0', 'batch')}"
            if name != "never"
            else "Online, never published again",
            publish_every_ms=age,
            ablation="publish_every",
        )
        for name, age in SPANS.items()
    ]
    return [
        *online,
        ArmInfo(name="retrained", kind="retrained", title="Retrained every 1d on 30d", publish_every_ms=DAY_MS),
        ArmInfo(name="popularity", kind="baseline", title="Decayed popularity"),
        ArmInfo(name="cooccurrence", kind="baseline", title="Last-item co-occurrence"),
    ]


def make_run(
    root: Path, *, num_queries: int = 4_000, seed: int = 0, num_parts: int = 2, lift: float = 0.0
) -> RunFolder:
    """Ranks are drawn per arm around a skill that a change in the middle of the stream lowers for stale weights."""
    rng = np.random.default_rng(seed)
    days = 10
    times = np.sort(T0 + rng.integers(0, days * DAY_MS, num_queries))
    shared: dict[str, NDArray[Any]] = {
        "event": np.arange(num_queries) * 2,
        "event_time_ms": times,
        "user_id": rng.integers(0, num_queries // 8, num_queries),
        "item_id": rng.integers(0, NUM_ITEMS, num_queries),
        "item_kind": rng.choice([0, 1, 2], num_queries, p=[0.05, 0.25, 0.7]).astype(np.int8),
        "user_kind": rng.choice([0, 1], num_queries, p=[0.2, 0.8]).astype(np.int8),
    }
    luck = rng.random(num_queries)
    writer = RunWriter(root)
    bounds = np.linspace(0, num_queries, num_parts + 1).astype(int)
    for low, high in itertools.pairwise(bounds):
        part = slice(int(low), int(high))
        writer.add_queries(**{name: column[part] for name, column in shared.items()})
        for place, arm in enumerate(arms()):
            _add_arm(writer, arm, shared, luck, part, lift if place == 0 else 0.0)
        _add_story(writer, times[part], shared["event"][part], is_second=bool(low > 0))
        writer.end_part()
    writer.write_manifest(_manifest(num_queries, writer.num_parts, times))
    writer.add_speed(events=num_queries * 2, wall_s=3.0, cpu_s=2.5)
    return RunFolder.open(root)


def _skill(arm: ArmInfo, share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chance of ranking high, by how much of the stream is over."""
    base = {"popularity": 0.22, "cooccurrence": 0.26, "retrained": 0.30}.get(arm.name)
    if base is not None:
        return np.where(share < 0.5, base, base - 0.03)
    stale = [0.0, 0.002, 0.02, 0.06, 0.16][list(SPANS).index(arm.name.removeprefix("online-"))]
    return 0.38 - stale * (0.5 + (share >= 0.5) * share)


def _add_arm(
    writer: RunWriter,
    arm: ArmInfo,
    shared: dict[str, NDArray[Any]],
    luck: NDArray[np.float64],
    part: slice,
    lift: float,
) -> None:
    event, times = shared["event"][part], shared["event_time_ms"][part]
    own = np.random.default_rng([int(event[0]), len(arm.name), sum(arm.name.encode())])
    share = (times - T0) / (10 * DAY_MS)
    skill = _skill(arm, share) + lift
    # Mostly shared luck: an easy query is easy for every arm.
    drawn = 0.85 * luck[part] + 0.15 * own.random(len(event))
    rank = np.where(drawn < skill, 1 + (drawn / skill * 20), 21 + (drawn - skill) * (NUM_ITEMS - 22)).astype(np.int64)
    rank[shared["item_kind"][part] == 0] = MISS_RANK
    age = arm.publish_every_ms if arm.publish_every_ms is not None else 5 * DAY_MS
    is_baseline = arm.kind == "baseline"
    writer.add_ranks(
        arm.name,
        event=event,
        rank=rank,
        num_candidates=np.full(len(event), NUM_ITEMS, np.int32),
        version=np.zeros(len(event), np.int32) if not age else (times // age % 2**31).astype(np.int32),
        weights_age_ms=[None] * len(event) if is_baseline else (own.random(len(event)) * age).astype(np.int64),
        history_age_ms=own.integers(0, DAY_MS, len(event)),
    )
    sampled = np.flatnonzero(event % 20 == 0)
    best = [
        ((np.arange(10) * 7 + at * (1 if is_baseline else 13)) % NUM_ITEMS).tolist() for at in event[sampled] // 100
    ]
    writer.add_lists(
        arm.name,
        event=event[sampled],
        item_ids=best,
        probabilities=[None if is_baseline else (np.linspace(0.1, 0.01, 10)).tolist() for _ in sampled],
        target_probability=[None if is_baseline else 0.01 for _ in sampled],
    )
    if not is_baseline:
        for number, at in enumerate(range(int(times[0]), int(times[-1]), max(age, DAY_MS))):
            writer.add_publication(
                arm=arm.name, version=number, time_ms=at, num_interactions=100 * number, watermark_ms=at,
                num_rows=50, num_bytes=20_000,
            )  # fmt: skip


def _add_story(writer: RunWriter, times: NDArray[np.int64], events: NDArray[np.int64], *, is_second: bool) -> None:
    for day in range(5):
        place = len(times) * day // 5
        writer.add_timeline(
            event=int(events[place]), time_ms=int(times[place]), num_items=200 + 60 * day + 300 * is_second,
            num_new_items=60, num_retired_items=3 * day, num_interactions=800, num_late=2, num_refused=0,
        )  # fmt: skip
    if is_second:
        writer.add_drift(
            event=int(events[40]), time_ms=int(times[40]), detector="page_hinkley", signal="loss",
            reactions="rehearse", sentence="the loss rose: page_hinkley <b>alarm</b>",
        )  # fmt: skip


def _manifest(num_queries: int, num_parts: int, times: NDArray[np.int64]) -> RunManifest:
    return RunManifest(
        name="made-up <news>",
        is_complete=True,
        created_at="2026-01-02T03:04:05Z",
        config={"backtest": {"name": "made-up", "seeds": [0]}, "trainer": {"batch_tokens": 2048}},
        lineage={"source": {"path": "clicks & more.parquet", "sha256": "ab" * 32}, "commit": "0123abc", "cpu": "x86"},
        seed=0,
        arms=arms(),
        num_events=num_queries * 2,
        num_evaluated=num_queries,
        first_event_time_ms=int(times[0]),
        last_event_time_ms=int(times[-1]),
        evaluated_from_ms=int(times[0]),
        counts={"accepted": num_queries * 2 - 5, "duplicate": 5},
        metrics={"model.lifetime.hr_at_10": 0.3},
        fingerprints={"histories": "11" * 32, "weights": "22" * 32},
        wall_s=30.0,
        cpu_s=40.0,
        costs={
            "shared": ArmCosts(cpu_s=20.0),
            **{
                arm.name: ArmCosts(
                    cpu_s=1.0 + place, num_publications=5 * (8 - place), num_bytes_published=20_000 * 5 * (8 - place)
                )
                for place, arm in enumerate(arms())
            },
        },
        num_parts=num_parts,
    )
