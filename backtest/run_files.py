"""What a backtest leaves in its folder: written by the engine, read by reports and time travel.

    <run>/run.json                       RunManifest: configuration, lineage, arms, costs, fingerprints
          queries/part-00000.parquet     one row an evaluated interaction, in the order of the stream
          ranks/<arm>/part-00000.parquet the same rows for every arm: where it ranked what came next
          lists/<arm>/part-00000.parquet of some of them: what the arm would have shown
          publications/part-00000.parquet what each arm published when
          timeline/part-00000.parquet    the catalogue as the stream went on
          drift/part-00000.parquet       what the drift detectors decided
          speed.jsonl                    how fast the run was; with run.json all that differs between equal runs

Parts are written at the run's checkpoints, the same rows in the same part for all tables. So the rows of one arm pair
with those of another by their place, and a run that was interrupted and went on leaves the bytes of one that was not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from backtest.errors import RunFolderError

UNKNOWN: Final = np.iinfo(np.int64).min
"""In an array of ages that is handed to a writer: null."""
RUN_SCHEMA: Final = 1
"""Of everything in a run's folder; raised when a reader of before could not read it."""

QUERIES: Final[Mapping[str, Any]] = {
    "event": pl.Int64,
    "event_time_ms": pl.Int64,
    "user_id": pl.Int64,
    "item_id": pl.Int64,
    "item_kind": pl.Int8,
    "user_kind": pl.Int8,
}
"""One evaluated interaction: an item that a user took next. event: its number in the source's order, from 0. item_kind
and user_kind: indexes into ``online_trainer.prequential.ITEM_KINDS`` and ``USER_KINDS``, as they were at the time."""

RANKS: Final[Mapping[str, Any]] = {
    "event": pl.Int64,
    "rank": pl.Int64,
    "num_candidates": pl.Int32,
    "version": pl.Int32,
    "weights_age_ms": pl.Int64,
    "history_age_ms": pl.Int64,
}
"""rank: 1-based among the whole catalogue as the arm knew it, without what the user had seen; ties count as worse;
``model.ranking.MISS_RANK`` for what the arm could not recommend. num_candidates: size of that catalogue. version: the
arm's publication that answered, -1 where there was none yet. weights_age_ms: from the newest event time that version
had learned from to the query; history_age_ms: from the newest interaction of the history used to the query; both null
where there was none."""

LISTS: Final[Mapping[str, Any]] = {
    "event": pl.Int64,
    "item_ids": pl.List(pl.Int64),
    "probabilities": pl.List(pl.Float32),
    "target_probability": pl.Float32,
}
"""Best first. probabilities: softmax over the catalogue without what the user had seen; null for arms that give none.
target_probability: of the item that came, 0 for a miss, null like probabilities."""

PUBLICATIONS: Final[Mapping[str, Any]] = {
    "arm": pl.String,
    "version": pl.Int32,
    "time_ms": pl.Int64,
    "num_interactions": pl.Int64,
    "watermark_ms": pl.Int64,
    "num_rows": pl.Int64,
    "num_bytes": pl.Int64,
}
"""time_ms: when, on the run's clock. num_interactions: learned from by then. num_rows, num_bytes: what it had to carry
beside what its replicas held already."""

TIMELINE: Final[Mapping[str, Any]] = {
    "event": pl.Int64,
    "time_ms": pl.Int64,
    "num_items": pl.Int64,
    "num_new_items": pl.Int64,
    "num_retired_items": pl.Int64,
    "num_interactions": pl.Int64,
    "num_late": pl.Int64,
    "num_refused": pl.Int64,
}
"""State at a time of the run's clock. num_items: live catalogue. The others: since the row before."""

DRIFT: Final[Mapping[str, Any]] = {
    "event": pl.Int64,
    "time_ms": pl.Int64,
    "detector": pl.String,
    "signal": pl.String,
    "reactions": pl.String,
    "sentence": pl.String,
}
"""reactions: separated by commas."""

_ARM_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmInfo:
    """One arm of a run."""

    name: str
    kind: str
    """`online`, `frozen`, `retrained`, `fine_tuned`, `baseline`."""
    title: str
    """For people."""
    settings: dict[str, Any] = field(default_factory=dict)
    """As in the configuration, in milliseconds and numbers."""
    publish_every_ms: int | None = None
    """Δ of an online arm: 0 after every batch; None for never, or where Δ means nothing."""
    weights_lag_ms: int = 0
    histories_lag_ms: int = 0
    ablation: str | None = None
    """`publish_every`, `weights_lag` or `histories_lag` where the arm is a point of that curve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmCosts:
    """What one arm took beyond what it shares with others."""

    cpu_s: float = 0.0
    num_publications: int = 0
    num_bytes_published: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunManifest:
    """run.json."""

    name: str
    is_complete: bool
    created_at: str
    """RFC 3339, when the run began; the wall clock's."""
    config: dict[str, Any]
    """The whole configuration of the run, with defaults."""
    lineage: dict[str, Any]
    """What it was made from: source and its sha256, versions of headrace and its libraries, commit, host's CPU."""
    seed: int
    arms: list[ArmInfo]
    num_events: int = 0
    """Read from the source."""
    num_evaluated: int = 0
    first_event_time_ms: int | None = None
    last_event_time_ms: int | None = None
    evaluated_from_ms: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    """What became of the events: accepted, duplicate, late, refused, ..."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The trainer's own prequential metrics, `arm.span.metric`."""
    vectors: dict[str, Any] = field(default_factory=dict)
    """Of a run with users' vectors: `upstream`, what became of them, and `gains`, what they bring each task of the
    ranker (``backtest.vector_gains``)."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """sha256 of `histories`, `weights` and `metrics` at the end: equal for equal runs, whatever the transport."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    costs: dict[str, ArmCosts] = field(default_factory=dict)
    """By arm; `shared` for what no arm had for itself: stream and store, and what is evaluated together."""
    num_parts: int = 0
    schema: int = RUN_SCHEMA


def check_arm_name(name: str) -> str:
    """The name; raises ValueError for one that cannot be a folder's."""
    if not _ARM_NAME.fullmatch(name):
        raise ValueError(f"arm {name!r}: 1 to 64 lower-case letters, digits, '.', '_' or '-', not first a sign")
    return name


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Reads a run."""

    root: Path
    manifest: RunManifest

    @classmethod
    def open(cls, root: Path) -> RunFolder:
        """Raises RunFolderError when there is no run, or one of another schema."""
        path = root / "run.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunFolderError(f"{root} holds no run: `headrace backtest run` writes {path}") from error
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} cannot be read: {error}") from error
        try:
            if stored.get("schema") != RUN_SCHEMA:
                raise RunFolderError(f"{path} has schema {stored.get('schema')}, this headrace reads {RUN_SCHEMA}")
            arms = [ArmInfo(**arm) for arm in stored.pop("arms")]
            costs = {name: ArmCosts(**cost) for name, cost in stored.pop("costs").items()}
            return cls(root, RunManifest(**stored, arms=arms, costs=costs))
        except (AttributeError, KeyError, TypeError) as error:
            raise RunFolderError(f"{path} cannot be read: it is no account of a run ({error!r})") from error

    def arm(self, name: str) -> ArmInfo:
        """Raises RunFolderError for an arm that the run does not have."""
        for arm in self.manifest.arms:
            if arm.name == name:
                return arm
        raise RunFolderError(f"{self.root} has no arm {name!r}: {', '.join(arm.name for arm in self.manifest.arms)}")

    def queries(self) -> pl.LazyFrame:
        """QUERIES."""
        return self._scan("queries", QUERIES)

    def ranks(self, arm: str) -> pl.LazyFrame:
        """RANKS, row by row those of ``queries``."""
        return self._scan(f"ranks/{self.arm(arm).name}", RANKS)

    def lists(self, arm: str) -> pl.LazyFrame:
        """LISTS; empty for an arm that gives none."""
        return self._scan(f"lists/{self.arm(arm).name}", LISTS)

    def publications(self) -> pl.LazyFrame:
        """PUBLICATIONS."""
        return self._scan("publications", PUBLICATIONS)

    def timeline(self) -> pl.LazyFrame:
        """TIMELINE."""
        return self._scan("timeline", TIMELINE)

    def drift(self) -> pl.LazyFrame:
        """DRIFT."""
        return self._scan("drift", DRIFT)

    def _scan(self, table: str, schema: Mapping[str, Any]) -> pl.LazyFrame:
        parts = [self.root / table / _part(number) for number in range(self.manifest.num_parts)]
        present = [part for part in parts if part.is_file()]
        if not present:
            return pl.LazyFrame(schema=dict(schema))
        return pl.scan_parquet(present)


class RunWriter:
    """Collects rows and writes them part by part."""

    def __init__(self, root: Path, *, num_parts: int = 0) -> None:
        self._root, self.num_parts = root, num_parts
        self._rows: dict[str, list[dict[str, Any]]] = {}
        root.mkdir(parents=True, exist_ok=True)
        self._drop_parts_from(num_parts)

    def _drop_parts_from(self, number: int) -> None:
        """What an interrupted run wrote after its last checkpoint comes again."""
        for path in sorted(self._root.glob("**/part-*.parquet")):
            if int(path.stem.removeprefix("part-")) >= number:
                path.unlink()

    def add_queries(self, **columns: Any) -> None:
        """Rows of QUERIES, column by column."""
        self._add("queries", QUERIES, columns)

    def add_ranks(self, arm: str, **columns: Any) -> None:
        """Rows of RANKS."""
        self._add(f"ranks/{check_arm_name(arm)}", RANKS, columns)

    def add_lists(self, arm: str, **columns: Any) -> None:
        """Rows of LISTS."""
        self._add(f"lists/{check_arm_name(arm)}", LISTS, columns)

    def add_publication(self, **values: Any) -> None:
        """A row of PUBLICATIONS."""
        self._add("publications", PUBLICATIONS, {name: [value] for name, value in values.items()})

    def add_timeline(self, **values: Any) -> None:
        """A row of TIMELINE."""
        self._add("timeline", TIMELINE, {name: [value] for name, value in values.items()})

    def add_drift(self, **values: Any) -> None:
        """A row of DRIFT."""
        self._add("drift", DRIFT, {name: [value] for name, value in values.items()})

    def _add(self, table: str, schema: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        assert columns.keys() == schema.keys(), f"{table}: {sorted(columns)} instead of {sorted(schema)}"
        self._rows.setdefault(table, []).append({name: columns[name] for name in schema})

    def end_part(self) -> int:
        """Write what was added, the ranks of every arm in the order of their events; how many parts there are now."""
        for table, parts in sorted(self._rows.items()):
            rows = _joined(parts, _schema_of(table))
            if "arm" not in rows.columns:
                rows = rows.sort("event", maintain_order=True)
            path = self._root / table / _part(self.num_parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, partial(rows.write_parquet, compression="zstd", statistics=False))
        self._rows.clear()
        self.num_parts += 1
        return self.num_parts

    def write_manifest(self, manifest: RunManifest) -> None:
        """run.json, whole or not at all."""
        write_manifest(self._root, manifest)

    def add_speed(self, **values: float) -> None:
        """A line of speed.jsonl."""
        with (self._root / "speed.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")


def write_manifest(root: Path, manifest: RunManifest) -> None:
    """run.json, whole or not at all."""
    write_json(root / "run.json", asdict(manifest))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    _replace(path, lambda aside: aside.write_text(text, encoding="utf-8"))


_TABLES: Final = {
    "queries": QUERIES,
    "ranks": RANKS,
    "lists": LISTS,
    "publications": PUBLICATIONS,
    "timeline": TIMELINE,
    "drift": DRIFT,
}


def _schema_of(table: str) -> Mapping[str, Any]:
    return _TABLES[table.split("/", maxsplit=1)[0]]


def _joined(parts: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> pl.DataFrame:
    """Columns of many small parts, arrays or lists, as one table; UNKNOWN becomes null."""
    columns = {}
    for name, kind in schema.items():
        pieces = [part[name] for part in parts]
        if all(isinstance(piece, np.ndarray) for piece in pieces):
            column = pl.Series(name, np.concatenate(pieces)).cast(kind)
            columns[name] = column.set(column == UNKNOWN, None) if kind == pl.Int64 else column
        else:
            columns[name] = pl.Series(name, [value for piece in pieces for value in piece], dtype=kind)
    return pl.DataFrame(columns)


def _part(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    aside.replace(path)


def read_speed(root: Path) -> Sequence[dict[str, float]]:
    """Lines of speed.jsonl: `events` read, `wall_s` and `cpu_s` since the run began or went on; [] without any."""
    path = root / "speed.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
