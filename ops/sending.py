"""Messages from the terminal: commands, and which snapshot workers are to look at."""

from __future__ import annotations

from model.manifest import Manifest
from stream.kafka import KafkaLog
from stream.log import acknowledged
from stream.messages import Command, SnapshotPointer, encode_message


async def send_command(log: KafkaLog, command: Command) -> None:
    """Return once the log holds the command; raises LogUnavailableError."""
    await _send(log, log.topics.commands, encode_message(command), key=None)


async def announce_snapshot(log: KafkaLog, manifest: Manifest) -> None:
    """Make workers look at the pointer now; raises LogUnavailableError."""
    pointer = SnapshotPointer(
        model=manifest.model,
        version=manifest.version,
        kind=manifest.kind,
        parent=manifest.parent,
        created_at_ms=manifest.created_at_ms,
    )
    await _send(log, log.topics.snapshots, encode_message(pointer), key=manifest.model.encode())


async def _send(log: KafkaLog, topic: str, message: bytes, *, key: bytes | None) -> None:
    await log.create_topics()
    writer = log.writer()
    await writer.start()
    try:
        await acknowledged([await writer.send(topic, message, key=key)])
    finally:
        await writer.stop()
