"""SQL of log positions, published snapshots and who served them first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict

from sqlalchemy import Connection, case, func, select

from feature_store.errors import PositionError
from feature_store.records import FirstServed, LogPosition, PublicationFloor, PublishedSnapshot
from feature_store.tables import first_served, log_position, publication_floor, published_snapshot
from feature_store.values import insert_missing, upsert


def lock_position(connection: Connection, log_id: str, topic: str, partition: int) -> LogPosition:
    """Lock one partition's position until the transaction ends; see `StoreTransaction.lock_position`."""
    key = {"log_id": log_id, "topic": topic, "partition": partition}
    connection.execute(insert_missing(connection.dialect.name, log_position).values(next_offset=0, **key))
    # SQLite has no row locks and needs none: BEGIN IMMEDIATE holds the only write lock already.
    query = select(log_position.c.next_offset, log_position.c.watermark_ms).filter_by(**key).with_for_update()
    row = connection.execute(query).one()
    return LogPosition(row.next_offset, row.watermark_ms)


def set_position(
    connection: Connection, log_id: str, topic: str, partition: int, next_offset: int, watermark_ms: int
) -> None:
    """Move one partition's position and watermark forward; see `StoreTransaction.set_position`."""
    stored_ms = log_position.c.watermark_ms
    statement = (
        log_position.update()
        .filter_by(log_id=log_id, topic=topic, partition=partition)
        .where(log_position.c.next_offset <= next_offset)
        .values(next_offset=next_offset, watermark_ms=case((stored_ms < watermark_ms, watermark_ms), else_=stored_ms))
    )
    if connection.execute(statement).rowcount != 1:
        stored = load_positions(connection, log_id, topic).get(partition)
        raise PositionError(
            f"position of {topic}[{partition}] in log {log_id!r} is {stored}, it cannot become {next_offset}: lock it "
            "first, and use a new log_id for a log that was reset"
        )


def load_positions(connection: Connection, log_id: str, topic: str) -> dict[int, int]:
    """Next offset to apply of every partition that has one."""
    query = select(log_position.c.partition, log_position.c.next_offset).filter_by(log_id=log_id, topic=topic)
    return {row.partition: row.next_offset for row in connection.execute(query)}


def load_watermark(connection: Connection) -> int:
    """The highest event time that any partition of any log has brought; 0 before the first.

    Every ingest worker moves its own partition's watermark, so that none waits for another.
    """
    watermark_ms: int = connection.execute(select(func.coalesce(func.max(log_position.c.watermark_ms), 0))).scalar_one()
    return watermark_ms


def log_generation(connection: Connection, log_id: str) -> int:
    """How often a log was made anew: its newest generation with a position; 0 when there is none."""
    before = generation_name(log_id, "")
    query = select(log_position.c.log_id).where(log_position.c.log_id.startswith(before, autoescape=True)).distinct()
    numbers = [name.removeprefix(before) for name in connection.execute(query).scalars()]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def generation_name(log_id: str, generation: int | str) -> str:
    """`main~2` is the log `main` after it was made anew twice."""
    return log_id if generation == 0 else f"{log_id}~{generation}"


def record_published(connection: Connection, snapshot: PublishedSnapshot) -> None:
    """Store what was published, replacing an earlier record of the same version."""
    row = asdict(snapshot)
    statement = upsert(connection.dialect.name, published_snapshot).values(row)
    statement = statement.on_conflict_do_update(
        index_elements=list(published_snapshot.primary_key),
        set_={name: statement.excluded[name] for name in row if name not in published_snapshot.primary_key.columns},
    )
    connection.execute(statement)


def load_published(
    connection: Connection, model: str, since_version: int, created_from_ms: int, limit: int | None
) -> list[PublishedSnapshot]:
    """Snapshots of a model with a version above `since_version`, oldest first."""
    columns = published_snapshot.c
    query = (
        select(published_snapshot)
        .where(columns.model == model, columns.version > since_version, columns.created_at_ms >= created_from_ms)
        .order_by(columns.version)
        .limit(limit)
    )
    return [PublishedSnapshot(**row) for row in connection.execute(query).mappings()]


def load_newest(connection: Connection, model: str) -> PublishedSnapshot | None:
    """The highest published version of a model."""
    query = select(published_snapshot).filter_by(model=model).order_by(published_snapshot.c.version.desc()).limit(1)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else PublishedSnapshot(**row)


def record_first_served(connection: Connection, served: FirstServed) -> None:
    """Store when a replica first answered with a version; the earliest time stays."""
    statement = upsert(connection.dialect.name, first_served).values(asdict(served))
    statement = statement.on_conflict_do_update(
        index_elements=list(first_served.primary_key),
        set_={name: statement.excluded[name] for name in ("at_ms", "swapped_at_ms")},
        where=first_served.c.at_ms > statement.excluded.at_ms,
    )
    connection.execute(statement)


def load_first_served(connection: Connection, model: str, since_version: int) -> list[FirstServed]:
    """First answers with versions above `since_version`, by version and replica."""
    query = (
        select(first_served)
        .where(first_served.c.model == model, first_served.c.version > since_version)
        .order_by(first_served.c.version, first_served.c.replica)
    )
    return [FirstServed(**row) for row in connection.execute(query).mappings()]


def load_first_answers(connection: Connection, model: str, version: int) -> list[FirstServed]:
    """Of each replica, its first answer with `version` or a later one, by replica."""
    columns = first_served.c
    earliest = (
        select(columns.replica, func.min(columns.at_ms).label("at_ms"))
        .where(columns.model == model, columns.version >= version)
        .group_by(columns.replica)
        .subquery()
    )
    query = (
        select(first_served)
        .join(earliest, (columns.replica == earliest.c.replica) & (columns.at_ms == earliest.c.at_ms))
        .where(columns.model == model, columns.version >= version)
        .order_by(columns.replica, columns.version)
    )
    # Versions that were passed over have the time of the answer that made up for them: its version is the last.
    found = {row["replica"]: FirstServed(**row) for row in connection.execute(query).mappings()}
    return list(found.values())


def load_floor(connection: Connection, model: str) -> PublicationFloor:
    """What has been removed of a model's publications."""
    query = select(publication_floor.c.version, publication_floor.c.newest_ms).filter_by(model=model)
    row = connection.execute(query).one_or_none()
    return PublicationFloor() if row is None else PublicationFloor(version=row.version, newest_ms=row.newest_ms)


def prune(connection: Connection, model: str, *, before_ms: int, kept: Collection[int], limit: int) -> int:
    """Remove rows of the oldest versions, and raise the floor with them; see `FeatureStore.prune_publications`."""
    columns = published_snapshot.c
    is_young = (columns.model == model) & (columns.created_at_ms >= before_ms)
    # By version, not by time alone: a clock that was set back must leave no gap above the floor.
    end = connection.execute(select(func.min(columns.version)).where(is_young)).scalar_one()
    if end is None:
        end = connection.execute(select(func.max(columns.version)).where(columns.model == model)).scalar_one()
    if end is None:
        return 0
    query = select(columns.version, columns.created_at_ms).where(columns.model == model, columns.version < end)
    oldest = connection.execute(query.order_by(columns.version).limit(limit + len(kept)))
    old = [row for row in oldest if row.version not in kept][:limit]
    if not old:
        return 0
    versions = [row.version for row in old]
    connection.execute(published_snapshot.delete().where(columns.model == model, columns.version.in_(versions)))
    _raise_floor(connection, model, versions[-1] + 1, max(row.created_at_ms for row in old))
    served = first_served.c
    is_known = select(columns.version).where(columns.model == model, columns.version == served.version).exists()
    # Also those that a worker could only note after their version had been removed.
    is_left = (served.model == model) & (served.version <= versions[-1]) & ~is_known
    connection.execute(first_served.delete().where(is_left))
    return len(versions)


def _raise_floor(connection: Connection, model: str, version: int, newest_ms: int) -> None:
    columns = publication_floor.c
    statement = upsert(connection.dialect.name, publication_floor)
    statement = statement.values(model=model, version=version, newest_ms=newest_ms)
    raised = {
        name: case((columns[name] < statement.excluded[name], statement.excluded[name]), else_=columns[name])
        for name in ("version", "newest_ms")
    }
    connection.execute(statement.on_conflict_do_update(index_elements=list(publication_floor.primary_key), set_=raised))
