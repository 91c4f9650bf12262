"""A bounded queue in front of the one thread that owns the model.

Weights, histories and answers are touched by that thread alone, one piece of work at a time. So an update or a swap
always falls between two micro-batches, and no answer can mix two versions.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from serving.config import ServingConfig
from serving.errors import DeadlineExceededError, DrainingError, QueueFullError
from serving.instruments import ServingInstruments

Query = TypeVar("Query")
Result = TypeVar("Result")


class ModelThread:
    """One thread, work in the order it was handed over."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do `work` in the thread after what was handed over earlier; its error is raised here."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """Finish what was handed over, then end the thread."""
        self._executor.shutdown(wait=True)


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Query, Result]):
    query: Query
    answer: asyncio.Future[Result]


class MicroBatcher(Generic[Query, Result]):
    """Collects concurrent requests and answers them with one call of `answer` in the model thread.

    While the model thread is busy, requests gather in the queue and form the next batch without waiting; a request
    that finds it idle waits `batch_wait_ms` for company.
    """

    def __init__(
        self,
        config: ServingConfig,
        model_thread: ModelThread,
        answer: Callable[[Sequence[Query]], Sequence[Result]],
        instruments: ServingInstruments,
    ) -> None:
        self._config = config
        self._model_thread = model_thread
        self._answer = answer
        self._instruments = instruments
        self._waiting: deque[_Waiting[Query, Result]] = deque()
        self._arrived = asyncio.Event()
        self._closed = False

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def is_closed(self) -> bool:
        """Whether new requests are refused."""
        return self._closed

    async def submit(self, query: Query) -> Result:
        """The answer to one request. Raises QueueFullError, DeadlineExceededError or DrainingError."""
        if self._closed:
            raise DrainingError("this worker is stopping: send the request again, to another one")
        if len(self._waiting) >= self._config.queue_max:
            raise QueueFullError(
                f"{self._config.queue_max} requests are waiting (serving.queue_max): send fewer, or add workers"
            )
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(query, answer))
        self._arrived.set()
        try:
            # A future that is cancelled here is not computed any more.
            return await asyncio.wait_for(answer, self._config.request_timeout_ms / 1000)
        except TimeoutError:
            raise DeadlineExceededError(
                f"no answer within {self._config.request_timeout_ms} ms (serving.request_timeout_ms)"
            ) from None

    def close(self) -> None:
        """Refuse new requests; `run` returns once the queue is answered."""
        self._closed = True
        self._arrived.set()

    async def run(self) -> None:
        """Answer batch after batch until closed and empty."""
        while True:
            batch = await self._next_batch()
            if batch:
                await self._answer_batch(batch)
            elif self._closed:
                return

    async def _next_batch(self) -> list[_Waiting[Query, Result]]:
        while not self._waiting:
            if self._closed:
                return []
            self._arrived.clear()
            await self._arrived.wait()
        if len(self._waiting) == 1 and self._config.batch_wait_ms and not self._closed:
            await asyncio.sleep(self._config.batch_wait_ms / 1000)
        batch: list[_Waiting[Query, Result]] = []
        while self._waiting and len(batch) < self._config.batch_max:
            waiting = self._waiting.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
        return batch

    async def _answer_batch(self, batch: list[_Waiting[Query, Result]]) -> None:
        queries = [waiting.query for waiting in batch]
        work = asyncio.ensure_future(self._model_thread.run(lambda: self._answer(queries)))
        await asyncio.wait([work])
        # A bug in the model's code fails the requests of this batch, not the worker.
        error = work.exception()
        if error is not None:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        self._instruments.batch_answered(len(batch))
        for waiting, result in zip(batch, work.result(), strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(result)
