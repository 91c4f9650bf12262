"""Commands from the terminal to the `commands` topic."""

from __future__ import annotations

from stream.kafka import KafkaLog
from stream.log import acknowledged
from stream.messages import Command, encode_message


async def send_command(log: KafkaLog, command: Command) -> None:
    """Return once the log holds the command; raises LogUnavailableError."""
    await log.create_topics()
    writer = log.writer()
    await writer.start()
    try:
        await acknowledged([await writer.send(log.topics.commands, encode_message(command))])
    finally:
        await writer.stop()
