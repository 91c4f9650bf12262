"""A bounded queue in front of the one thread that owns the model.

Weights, histories and answers are touched by that thread alone, one piece of work at a time. So an update or a swap
always falls between two micro-batches, and no answer can mix two versions.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from serving.config import ServingConfig
from serving.errors import DeadlineExceededError, DrainingError, QueueFullError
from serving.instruments import ServingInstruments

Query = TypeVar("Query")
Result = TypeVar("Result")

_SMOOTHING: Final = 0.2
"""Weight of the newest batch in the mean time of a batch: one that was held up is forgotten within ten others."""

_SPARE_S: Final = 0.005
"""How much earlier than needed for a deadline a batch is closed: timers are late by a millisecond or more."""

_caller_waits_until_s: ContextVar[float] = ContextVar("caller_waits_until_s", default=math.inf)


@contextmanager
def caller_waiting_until(loop_s: float | None) -> Iterator[None]:
    """Tells `MicroBatcher.submit` inside how long (time of the event loop) the caller waits; None: for ever."""
    token = _caller_waits_until_s.set(math.inf if loop_s is None else loop_s)
    try:
        yield
    finally:
        _caller_waits_until_s.reset(token)


class ModelThread:
    """One thread, work in the order it was handed over."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do `work` in the thread after what was handed over earlier; its error is raised here."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def hand_over(self, work: Callable[[], Result], done: Callable[[Future[Result]], None]) -> None:
        """The same without anybody who waits: `done` is called in the event loop."""
        loop = asyncio.get_running_loop()

        def tell(future: Future[Result]) -> None:
            if not loop.is_closed():  # whoever handed it over has gone
                loop.call_soon_threadsafe(done, future)

        self._executor.submit(work).add_done_callback(tell)

    def close(self) -> None:
        """Finish what was handed over, then end the thread."""
        self._executor.shutdown(wait=True)


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Query, Result]):
    query: Query
    answer: asyncio.Future[Result]
    arrived_s: float
    deadline_s: float


class MicroBatcher(Generic[Query, Result]):
    """Collects concurrent requests and answers them with one call of `answer` in the model thread.

    While the model thread is busy, requests gather in the queue and form the next batch without waiting. Otherwise a
    batch is closed when it is full, when its oldest request has waited `batch_wait_ms` for company, or when a deadline
    in it leaves just the time that a batch takes: whichever comes first.

    A request that would not be answered before its deadline is refused when it comes, judged by the batches before it
    and how long the last ones took. So under overload those that are admitted are answered in time.
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
        self._closed = False
        self._emptied = asyncio.Event()
        self._is_answering = False
        self._timer: asyncio.TimerHandle | None = None
        """Closes the batch that is gathering."""
        self._batch_s = 0.0
        """How long a batch takes, a moving mean."""

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
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        deadline_s = min(now_s + self._config.request_timeout_ms / 1000, _caller_waits_until_s.get())
        self._admit(deadline_s - now_s)
        answer: asyncio.Future[Result] = loop.create_future()
        self._waiting.append(_Waiting(query, answer, now_s, deadline_s))
        self._go_on()
        expiry = loop.call_later(self._config.request_timeout_ms / 1000, self._expire, answer)
        try:
            # A future that is cancelled here is not computed any more.
            return await answer
        finally:
            expiry.cancel()

    def _expire(self, answer: asyncio.Future[Result]) -> None:
        if not answer.done():
            timeout_ms = self._config.request_timeout_ms
            answer.set_exception(
                DeadlineExceededError(f"no answer within {timeout_ms} ms (serving.request_timeout_ms)")
            )

    def _admit(self, left_s: float) -> None:
        """Raises QueueFullError unless there is room, and an answer can be expected within `left_s`."""
        # With nothing ahead there is nothing to refuse for: one request is always tried.
        num_batches = len(self._waiting) // self._config.batch_max + self._is_answering
        expected_s = num_batches * self._batch_s
        if len(self._waiting) >= self._config.queue_max:
            raise QueueFullError(
                f"{self._config.queue_max} requests are waiting (serving.queue_max): send fewer, or add workers",
                retry_after_s=max(1, math.ceil(expected_s)),
            )
        if num_batches and expected_s + self._batch_s > left_s:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting, and an answer is expected in"
                f" {(expected_s + self._batch_s) * 1000:.0f} ms, later than {left_s * 1000:.0f} ms: send fewer, or add"
                " workers",
                retry_after_s=max(1, math.ceil(expected_s)),
            )

    def close(self) -> None:
        """Refuse new requests; `run` returns once the queue is answered."""
        self._closed = True
        self._go_on()

    async def run(self) -> None:
        """Return when closed, and everything is answered."""
        await self._emptied.wait()

    # From here on callbacks, not tasks that wait for each other: in every turn of the event loop that a request takes,
    # the model thread may take the interpreter away.

    def _go_on(self) -> None:
        """Answer the batch that is gathering, or see to it that it is closed in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._waiting and not self._is_answering:
            closes_s = self._closes_s()
            if closes_s > loop.time():
                self._timer = loop.call_at(closes_s, self._go_on)
                return
            if batch := self._taken(loop.time()):
                self._start(batch, loop.time())
        if self._closed and not self._waiting and not self._is_answering:
            self._emptied.set()

    def _closes_s(self) -> float:
        """When the batch that is gathering is to be closed."""
        if self._closed or len(self._waiting) >= self._config.batch_max:
            return -math.inf
        in_time_s = min(waiting.deadline_s for waiting in self._waiting) - self._batch_s - _SPARE_S
        return min(self._waiting[0].arrived_s + self._config.batch_wait_ms / 1000, in_time_s)

    def _taken(self, now_s: float) -> list[_Waiting[Query, Result]]:
        batch: list[_Waiting[Query, Result]] = []
        while self._waiting and len(batch) < self._config.batch_max:
            waiting = self._waiting.popleft()
            # Its own timer tells whoever is too late; that may run after us.
            if not waiting.answer.done() and waiting.deadline_s > now_s:
                batch.append(waiting)
        return batch

    def _start(self, batch: list[_Waiting[Query, Result]], started_s: float) -> None:
        queries = [waiting.query for waiting in batch]
        self._is_answering = True
        self._model_thread.hand_over(lambda: self._answer(queries), lambda work: self._done(batch, work, started_s))

    def _done(self, batch: list[_Waiting[Query, Result]], work: Future[Sequence[Result]], started_s: float) -> None:
        self._is_answering = False
        took_s = asyncio.get_running_loop().time() - started_s
        self._batch_s = took_s if self._batch_s == 0 else self._batch_s + _SMOOTHING * (took_s - self._batch_s)
        # A bug in the model's code fails the requests of this batch, not the worker.
        if (error := work.exception()) is not None:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
        else:
            self._instruments.batch_answered(len(batch))
            for waiting, result in zip(batch, work.result(), strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(result)
        self._go_on()
