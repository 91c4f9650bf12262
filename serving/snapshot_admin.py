"""The admin routes' work on snapshots: what `headrace snapshots` does at a terminal, over HTTP and audited."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from model.errors import SnapshotError, SnapshotMissingError, SnapshotStorageError
from model.listing import read_snapshots
from model.manifest import Manifest
from model.storage import SnapshotRoot, SnapshotStorage, open_storage
from serving.access import Caller
from serving.errors import AdminRefusedError
from serving.log_writer import SharedWriter
from stream.errors import LogUnavailableError
from stream.log import acknowledged
from stream.messages import SnapshotPointer, encode_message

_audit = logging.getLogger("headrace.audit")
_logger = logging.getLogger(__name__)

_ANNOUNCE_S: Final = 2.0
"""Workers look at the pointer anyway: an announcement is not worth more waiting."""

Done = TypeVar("Done")
Operation = Callable[[SnapshotStorage, str], Done]
"""Something of `model.pinning`, told the storage and the model's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What an operator asked for, in which request."""

    what: str
    caller: Caller
    request_id: str

    def __str__(self) -> str:
        return f"{self.what}, asked for by {self.caller} (request {self.request_id})"


class SnapshotAdmin:
    """Operations on the snapshots of one model, one at a time. Raises AdminRefusedError."""

    def __init__(
        self, root: SnapshotRoot, model: str, writer: SharedWriter, topic: str, look_at_once: Callable[[], None]
    ) -> None:
        self._storage, self._model = open_storage(root), model
        self._writer, self._topic = writer, topic
        self._look_at_once = look_at_once
        self._working = asyncio.Lock()

    async def listing(self) -> dict[str, object]:
        """Every version and what is to be said of it; JSON-ready."""
        return (await self._do(read_snapshots)).to_dict()

    async def carry_out(self, operation: Operation[Manifest | int | None], asked: Asked) -> int | None:
        """Do what an operator asked for, and have all workers look; the version it was about, if there was one."""
        done = await self.audited(self._do(operation), asked)
        self._look_at_once()
        if not isinstance(done, Manifest):
            return done
        await self._announce(done)
        return done.version

    async def audited(self, work: Awaitable[Done], asked: Asked) -> Done:
        """Await what an operator asked for, and leave a line in the log about it."""
        try:
            done = await work
        except AdminRefusedError as error:
            _audit.warning("%s: refused, %s", asked, error)
            raise
        _audit.warning("%s: done", asked)
        return done

    async def _do(self, operation: Operation[Done]) -> Done:
        try:
            async with self._working:
                return await asyncio.to_thread(operation, self._storage, self._model)
        except SnapshotMissingError as error:
            raise AdminRefusedError(str(error), status=404, code="no_such_snapshot") from error
        except (SnapshotStorageError, OSError) as error:
            raise AdminRefusedError(str(error), status=503, code="snapshots_unavailable") from error
        except SnapshotError as error:
            raise AdminRefusedError(str(error), status=409, code="snapshot_refused") from error

    async def _announce(self, manifest: Manifest) -> None:
        pointer = SnapshotPointer(
            model=manifest.model,
            version=manifest.version,
            kind=manifest.kind,
            parent=manifest.parent,
            created_at_ms=manifest.created_at_ms,
        )
        try:
            async with asyncio.timeout(_ANNOUNCE_S):
                send = await self._writer.send(self._topic, encode_message(pointer), key=manifest.model.encode())
                await acknowledged([send])
        except (LogUnavailableError, TimeoutError) as error:
            _logger.warning("not announced, other workers find it within serving.snapshot_poll_ms: %s", error)
