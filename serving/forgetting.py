"""`DELETE /v1/users/{user_id}`: the command to forget a user, into the log."""

from __future__ import annotations

import asyncio

from serving.config import ServingConfig
from serving.errors import LogAwayError
from serving.log_writer import SharedWriter
from stream.errors import LogUnavailableError
from stream.log import acknowledged
from stream.messages import ForgetUser, encode_message
from stream.tracing import current_headers


class UserRemoval:
    """Sends `forget_user` commands; ingest carries them out."""

    def __init__(self, config: ServingConfig, writer: SharedWriter, topic: str) -> None:
        self._config, self._writer, self._topic = config, writer, topic

    async def forget(self, user_id: int | str) -> None:
        """Return once the log holds the command; raises LogAwayError (sending it again is harmless)."""
        command = encode_message(ForgetUser(user_id=user_id))
        try:
            async with asyncio.timeout(self._config.events_timeout_ms / 1000):
                await acknowledged([await self._writer.send(self._topic, command, headers=current_headers())])
        except (LogUnavailableError, TimeoutError) as error:
            cause = str(error) or f"no answer within {self._config.events_timeout_ms} ms"
            raise LogAwayError(f"the log did not acknowledge the command ({cause}): send it again") from error
