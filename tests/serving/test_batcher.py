"""The queue in front of the model thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from serving.batcher import MicroBatcher, ModelThread, caller_waiting_until
from serving.config import ServingConfig
from serving.errors import DeadlineExceededError, DrainingError, QueueFullError
from serving.instruments import ServingInstruments
from tests.serving.building import eventually

CONFIG = ServingConfig(batch_max=4, batch_wait_ms=5, queue_max=6, request_timeout_ms=2_000)


class Doubling:
    """A model that doubles numbers, can be held up, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def answer(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        self.may_go_on.wait(5)
        if 13 in numbers:
            raise ZeroDivisionError("thirteen")
        return [2 * number for number in numbers]


@asynccontextmanager
async def running(model: Doubling, config: ServingConfig = CONFIG) -> AsyncIterator[MicroBatcher[int, int]]:
    thread = ModelThread()
    batcher: MicroBatcher[int, int] = MicroBatcher(config, thread, model.answer, ServingInstruments())
    task = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        model.may_go_on.set()
        batcher.close()
        await task
        thread.close()


async def held_up(model: Doubling, batcher: MicroBatcher[int, int]) -> asyncio.Task[int]:
    """A request that the model is busy with until `may_go_on` is set."""
    model.may_go_on.clear()
    busy = asyncio.create_task(batcher.submit(1))
    await eventually(lambda: model.batches)
    return busy


async def test_concurrent_requests_share_a_batch_and_each_gets_its_own_answer() -> None:
    model = Doubling()
    async with running(model) as batcher:
        assert await asyncio.gather(*(batcher.submit(n) for n in range(4))) == [0, 2, 4, 6]
    assert model.batches == [[0, 1, 2, 3]]


async def test_a_batch_is_never_larger_than_its_limit() -> None:
    model = Doubling()
    async with running(model) as batcher:
        assert await asyncio.gather(*(batcher.submit(n) for n in range(6))) == [0, 2, 4, 6, 8, 10]
    assert [len(batch) for batch in model.batches] == [4, 2]


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    model = Doubling()
    async with running(model) as batcher:
        busy = await held_up(model, batcher)
        waiting = [asyncio.create_task(batcher.submit(n)) for n in range(CONFIG.queue_max)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match=r"serving\.queue_max") as refused:
            await batcher.submit(99)
        assert refused.value.status == 429
        assert refused.value.retry_after_s == 1
        model.may_go_on.set()
        assert await busy == 2
        assert await asyncio.gather(*waiting) == [0, 2, 4, 6, 8, 10]


async def test_a_request_past_its_deadline_is_told_so_and_not_computed() -> None:
    model = Doubling()
    async with running(model, replace(CONFIG, request_timeout_ms=30)) as batcher:
        busy = await held_up(model, batcher)
        with pytest.raises(DeadlineExceededError, match="30 ms") as late:
            await batcher.submit(5)
        assert late.value.status == 504
        with pytest.raises(DeadlineExceededError):
            await busy
        model.may_go_on.set()
        assert await batcher.submit(6) == 12
    assert model.batches == [[1], [6]]


async def test_a_bug_fails_the_requests_of_its_batch_and_no_others() -> None:
    model = Doubling()
    async with running(model) as batcher:
        both = await asyncio.gather(batcher.submit(13), batcher.submit(2), return_exceptions=True)
        assert [type(one) for one in both] == [ZeroDivisionError, ZeroDivisionError]
        assert await batcher.submit(3) == 6


async def test_closing_answers_what_is_queued_and_refuses_what_comes_after() -> None:
    model = Doubling()
    async with running(model) as batcher:
        busy = await held_up(model, batcher)
        queued = asyncio.create_task(batcher.submit(4))
        await asyncio.sleep(0)
        batcher.close()
        with pytest.raises(DrainingError):
            await batcher.submit(5)
        model.may_go_on.set()
        assert (await busy, await queued) == (2, 8)


async def test_an_expired_request_is_not_computed_even_if_its_timer_had_no_chance_to_run() -> None:
    model = Doubling()
    async with running(model, replace(CONFIG, request_timeout_ms=100)) as batcher:
        busy = await held_up(model, batcher)
        late = asyncio.create_task(batcher.submit(5))
        await asyncio.sleep(0)
        model.may_go_on.set()
        time.sleep(0.15)  # noqa: ASYNC251 - an event loop that is held up is what this is about
        results = await asyncio.gather(busy, late, return_exceptions=True)
        assert isinstance(results[1], DeadlineExceededError)
        assert await batcher.submit(6) == 12
    assert model.batches == [[1], [6]]


async def test_a_caller_that_waits_less_long_is_not_computed_for_later() -> None:
    model = Doubling()
    async with running(model) as batcher:
        busy = await held_up(model, batcher)
        with caller_waiting_until(asyncio.get_running_loop().time() + 0.05):
            late = asyncio.create_task(batcher.submit(5))
        await asyncio.sleep(0.1)
        model.may_go_on.set()
        assert await busy == 2
        assert await batcher.submit(6) == 12
        late.cancel()
    assert model.batches == [[1], [6]]


async def test_a_batch_is_closed_in_time_for_the_earliest_deadline_in_it() -> None:
    model, loop = Doubling(), asyncio.get_running_loop()
    async with running(model, replace(CONFIG, batch_wait_ms=60_000, request_timeout_ms=120_000)) as batcher:
        patient = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.05)
        assert model.batches == []
        with caller_waiting_until(loop.time() + 0.3):
            assert await batcher.submit(2) == 4
        assert await patient == 2
    assert model.batches == [[1, 2]]


async def test_a_full_batch_waits_for_nobody() -> None:
    model = Doubling()
    async with running(model, replace(CONFIG, batch_wait_ms=60_000, request_timeout_ms=120_000)) as batcher:
        assert await asyncio.wait_for(asyncio.gather(*(batcher.submit(n) for n in range(4))), 30) == [0, 2, 4, 6]


async def test_under_overload_those_admitted_are_answered_in_time_and_the_others_told_when_to_come_back() -> None:
    """Four times as many requests as the model can answer: no queue builds up that nobody can wait for."""

    def answer(numbers: Sequence[int]) -> list[int]:
        time.sleep(0.04)
        return [2 * number for number in numbers]

    config, thread = replace(CONFIG, queue_max=1_000, request_timeout_ms=400), ModelThread()
    batcher: MicroBatcher[int, int] = MicroBatcher(config, thread, answer, ServingInstruments())
    running_batcher = asyncio.create_task(batcher.run())
    took_s, refused, late = [], [], 0

    async def ask(number: int) -> None:
        nonlocal late
        started_s = time.monotonic()
        try:
            assert await batcher.submit(number) == 2 * number
            took_s.append(time.monotonic() - started_s)
        except QueueFullError as error:
            refused.append(error)
        except DeadlineExceededError:
            late += 1

    async with asyncio.TaskGroup() as group:
        for number in range(800):
            group.create_task(ask(number))
            await asyncio.sleep(0.0025)
    batcher.close()
    await running_batcher
    thread.close()
    assert len(took_s) > 80
    assert len(refused) > 200
    assert {(error.status, error.retry_after_s) for error in refused} == {(429, 1)}
    assert late <= 0.25 * len(took_s)  # a few on a machine that stalls; without admission, most
    assert max(took_s) < 0.6  # never long after the deadline, also with a busy machine in between
    assert batcher.num_waiting == 0


async def test_a_request_that_finds_nobody_before_it_is_tried_however_long_the_last_one_took() -> None:
    model = Doubling()
    async with running(model, replace(CONFIG, request_timeout_ms=150)) as batcher:
        busy = await held_up(model, batcher)
        with pytest.raises(DeadlineExceededError):
            await busy
        await asyncio.sleep(0.2)
        model.may_go_on.set()
        await eventually(lambda: not batcher._is_answering)
        assert await batcher.submit(3) == 6
