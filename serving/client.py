"""Calls workers from Python: typed requests and answers, retries, deadlines; waiting or with `async`.

with Client(ClientConfig(url="https://recommend.internal", token=token)) as client:
client.recommend(RecommendRequest(user_id=5, k=3)).items
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
import msgspec

from serving.calling import Answer, Call, Caller, ClientConfig, Result, Send, Wait
from serving.messages import (
    AdminAnswer,
    EventsAccepted,
    ForgetAccepted,
    RankedCandidates,
    RankRequest,
    Recommendation,
    RecommendRequest,
    ShadowAnswer,
    SnapshotsAnswer,
)
from stream.clock import Clock, WallClock
from stream.events import Event


def recommend(request: RecommendRequest) -> Call[Recommendation]:
    """The best items for a user."""
    return Call(method="POST", path="/v1/recommend", body=msgspec.json.encode(request), answer=Recommendation)


def rank(request: RankRequest) -> Call[RankedCandidates]:
    """Given candidates in order of preference."""
    return Call(method="POST", path="/v1/rank", body=msgspec.json.encode(request), answer=RankedCandidates)


def send_events(events: Sequence[Event]) -> Call[EventsAccepted]:
    """Events into the log, all or none."""
    return Call(method="POST", path="/v1/events", body=msgspec.json.encode(events), answer=EventsAccepted)


def forget_user(user_id: int | str) -> Call[ForgetAccepted]:
    """Have everything about a user removed."""
    params = {"text": "true"} if isinstance(user_id, str) else None
    return Call(method="DELETE", path=f"/v1/users/{quote(str(user_id), safe='')}", params=params, answer=ForgetAccepted)


def status() -> Call[dict[str, Any]]:
    """Everything about a worker."""
    return Call(method="GET", path="/status", answer=dict[str, Any])


def snapshots() -> Call[SnapshotsAnswer]:
    """Every version and what is to be said of it."""
    return Call(method="GET", path="/admin/snapshots", answer=SnapshotsAnswer)


def roll_back(version: int) -> Call[AdminAnswer]:
    """Send workers to a version until the trainer publishes the next one."""
    return Call(method="POST", path=f"/admin/snapshots/{version}/rollback", answer=AdminAnswer)


def pin(version: int) -> Call[AdminAnswer]:
    """Send workers to a version, to stay there."""
    return Call(method="POST", path=f"/admin/snapshots/{version}/pin", answer=AdminAnswer)


def unpin() -> Call[AdminAnswer]:
    """Let workers follow the trainer again."""
    return Call(method="DELETE", path="/admin/pin", answer=AdminAnswer)


def offer_candidate(version: int) -> Call[AdminAnswer]:
    """Send canary workers to a version."""
    return Call(method="POST", path=f"/admin/snapshots/{version}/candidate", answer=AdminAnswer)


def promote_candidate() -> Call[AdminAnswer]:
    """Send all workers to the candidate."""
    return Call(method="POST", path="/admin/candidate/promote", answer=AdminAnswer)


def withdraw_candidate() -> Call[AdminAnswer]:
    """Send canary workers to where the others are."""
    return Call(method="DELETE", path="/admin/candidate", answer=AdminAnswer)


def start_shadow(version: int, *, share: float) -> Call[AdminAnswer]:
    """Have a version answer a share of the worker's requests again, aside."""
    return Call(method="POST", path=f"/admin/snapshots/{version}/shadow", params={"share": share}, answer=AdminAnswer)


def shadow() -> Call[ShadowAnswer]:
    """How far the answers of that version are from those in service."""
    return Call(method="GET", path="/admin/shadow", answer=ShadowAnswer)


def stop_shadow() -> Call[AdminAnswer]:
    """Compare no more."""
    return Call(method="DELETE", path="/admin/shadow", answer=AdminAnswer)


class Client:
    """Waits for its answers. Threads may share it. Raises what `Caller.steps` raises."""

    def __init__(
        self,
        config: ClientConfig,
        *,
        http: httpx.Client | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
    ) -> None:
        self._caller = Caller(config=config, clock=clock or WallClock(), random=random.Random(seed))
        self._http = http or httpx.Client(verify=config.tls())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def call(self, call: Call[Answer]) -> Answer:
        """Make a call: `client.call(pin(42))`."""
        steps, result = self._caller.steps(call), None
        try:
            while True:
                step = steps.send(result)
                result = None
                if isinstance(step, Wait):
                    time.sleep(step.seconds)
                else:
                    result = self._sent(step)
        except StopIteration as done:
            answer: Answer = done.value
            return answer

    def _sent(self, send: Send) -> Result:
        try:
            return self._http.request(
                send.method,
                send.url,
                content=send.content,
                params=send.params,
                headers=send.headers,
                timeout=send.timeout_s,
            )
        except httpx.TransportError as error:
            return error

    def recommend(self, request: RecommendRequest) -> Recommendation:
        """The best items for a user."""
        return self.call(recommend(request))

    def rank(self, request: RankRequest) -> RankedCandidates:
        """Given candidates in order of preference."""
        return self.call(rank(request))

    def send_events(self, events: Sequence[Event]) -> EventsAccepted:
        """Events into the log, all or none; sending them again changes nothing."""
        return self.call(send_events(events))

    def forget_user(self, user_id: int | str) -> ForgetAccepted:
        """Have everything about a user removed."""
        return self.call(forget_user(user_id))


class AsyncClient:
    """The same for an event loop. Tasks may share it. Raises what `Caller.steps` raises."""

    def __init__(
        self,
        config: ClientConfig,
        *,
        http: httpx.AsyncClient | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
    ) -> None:
        self._caller = Caller(config=config, clock=clock or WallClock(), random=random.Random(seed))
        self._http = http or httpx.AsyncClient(verify=config.tls())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def call(self, call: Call[Answer]) -> Answer:
        """Make a call: `await client.call(pin(42))`."""
        steps, result = self._caller.steps(call), None
        try:
            while True:
                step = steps.send(result)
                result = None
                if isinstance(step, Wait):
                    await asyncio.sleep(step.seconds)
                else:
                    result = await self._sent(step)
        except StopIteration as done:
            answer: Answer = done.value
            return answer

    async def _sent(self, send: Send) -> Result:
        try:
            # httpx's own limit is one for each read: an answer that trickles in would take longer.
            async with asyncio.timeout(send.timeout_s):
                return await self._http.request(
                    send.method,
                    send.url,
                    content=send.content,
                    params=send.params,
                    headers=send.headers,
                    timeout=send.timeout_s,
                )
        except httpx.TransportError as error:
            return error
        except TimeoutError:
            return httpx.ReadTimeout("the answer did not come to an end")

    async def recommend(self, request: RecommendRequest) -> Recommendation:
        """The best items for a user."""
        return await self.call(recommend(request))

    async def rank(self, request: RankRequest) -> RankedCandidates:
        """Given candidates in order of preference."""
        return await self.call(rank(request))

    async def send_events(self, events: Sequence[Event]) -> EventsAccepted:
        """Events into the log, all or none; sending them again changes nothing."""
        return await self.call(send_events(events))

    async def forget_user(self, user_id: int | str) -> ForgetAccepted:
        """Have everything about a user removed."""
        return await self.call(forget_user(user_id))
