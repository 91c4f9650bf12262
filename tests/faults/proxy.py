"""A TCP address that stays while the broker behind it is cut off, replaced, or comes back.

The broker has to advertise the proxy's address, or clients would find their way around it.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Self

from ops.local_broker import LocalBroker, LocalBrokerConfig
from ops.ports import free_port
from tests.faults.load import OBSERVER

_HOST: Final = "127.0.0.1"


class Proxy:
    """Forwards connections to a port; runs in a thread of its own."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.num_accepted = 0
        self._target_port = target_port
        self._lets_in_observers_only = False
        self._open: dict[asyncio.WriteTransport, bool] = {}
        """Transport → belongs to an observer."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def bootstrap_servers(self) -> str:
        """The address that stays."""
        return f"{_HOST}:{self.port}"

    def point_to(self, target_port: int) -> None:
        """Where new connections go from now on."""
        self._target_port = target_port

    def refuse(self) -> None:
        """Cut every connection and listen no more: connecting is refused by the operating system."""
        self._call(self._refuse())

    def cut(self) -> None:
        """Cut every connection but the test's own, and every new one as soon as it says who it is."""
        self._lets_in_observers_only = True
        self._call(self._abort(observers_too=False))

    def restore(self) -> None:
        """Forward everything again."""
        self._lets_in_observers_only = False
        self._call(self._listen())

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, _HOST, self.port)

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._abort(observers_too=True)

    async def _abort(self, *, observers_too: bool) -> None:
        for transport, is_observer in list(self._open.items()):
            if observers_too or not is_observer:
                transport.abort()
        await asyncio.sleep(0)

    async def _close(self) -> None:
        await self._refuse()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.num_accepted += 1
        try:
            await self._forward(reader, writer)
        except (OSError, EOFError):
            pass  # either side went away, which is what this is for
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A request begins with size, API, version, correlation id and client id.
        self._open[writer.transport] = False
        broker: asyncio.StreamWriter | None = None
        try:
            head = await reader.readexactly(14)
            (length,) = struct.unpack(">h", head[12:])
            client = await reader.readexactly(max(0, length))
            is_observer = client.decode() == OBSERVER
            if self._lets_in_observers_only and not is_observer:
                return
            from_broker, broker = await asyncio.open_connection(_HOST, self._target_port)
            self._open[writer.transport] = self._open[broker.transport] = is_observer
            broker.write(head + client)
            await asyncio.wait(
                [asyncio.create_task(_pump(reader, broker)), asyncio.create_task(_pump(from_broker, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for transport in (writer.transport, *([broker.transport] if broker is not None else [])):
                self._open.pop(transport, None)
                transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # the other direction ends with it


class ProxiedBroker:
    """A broker behind a proxy: one address for good, whatever happens to the process."""

    def __init__(self) -> None:
        self._port = free_port()
        self.proxy = Proxy(self._port)
        self.broker = self._new_broker()

    @property
    def bootstrap_servers(self) -> str:
        """What clients connect to."""
        return self.proxy.bootstrap_servers

    def replace(self) -> None:
        """SIGKILL the broker, and have an empty one behind the same address."""
        self.broker.kill()
        self._port = free_port()
        self.broker = self._new_broker()
        self.broker.start()
        self.proxy.point_to(self._port)

    def __enter__(self) -> Self:
        self.broker.start()
        self.proxy.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.proxy.__exit__(kind, error, at)
        self.broker.kill()

    def _new_broker(self) -> LocalBroker:
        return LocalBroker(LocalBrokerConfig(port=self._port, advertised_port=self.proxy.port))
