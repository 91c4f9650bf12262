"""Load on an inference worker, from a process of its own: requests at a fixed rate, whatever becomes of them.

    python benchmarks/serving_load.py --port 8080 --rate 200 --seconds 10 --users 500 [--candidates 50 --items 20000]

With --candidates, so many of item ids 0 to --items are to be ranked; else ten items are to be recommended.
A request's latency counts from the moment it was due, so a worker that stalls cannot hide behind requests that were not
sent meanwhile. Answers of one user and version are compared with each other. The output is one JSON object. Imports
nothing but the standard library: the load must not cost the core it shares.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 1e-3
"""Far above rounding, far below what another version changes."""


@dataclass
class Seen:
    """What came of the requests."""

    latency_ms: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    answers: dict[tuple[int, int], dict[int, float]] = field(default_factory=dict)
    num_compared: int = 0
    num_mixed: int = 0
    num_with_vector: int = 0
    """Candidates ranked with a user's vector from upstream."""

    def answered(self, user: int, due_s: float, status: int, body: bytes) -> None:
        self.latency_ms.append((time.perf_counter() - due_s) * 1000)
        if status != 200:
            self.outcomes[str(status)] += 1
            return
        answer = json.loads(body)
        self.outcomes["fallback" if answer["fallback"] else "ok"] += 1
        if "ranked_by" in answer:  # other candidates every time: nothing to compare
            self.num_with_vector += answer["upstream_age"] is not None
            return
        scores = {item["item_id"]: item["score"] for item in answer["items"]}
        first = self.answers.setdefault((user, answer["snapshot_version"]), scores)
        self.num_compared += first is not scores
        self.num_mixed += not same(first, scores)


def same(one: dict[int, float], other: dict[int, float]) -> bool:
    """Whether two answers agree; at equal scores the last of the list may be another item."""
    by_rank = zip(sorted(one.values()), sorted(other.values()), strict=False)
    return (
        len(one) == len(other)
        and all(abs(a - b) <= TOLERANCE for a, b in by_rank)
        and all(abs(one[item] - other[item]) <= TOLERANCE for item in one.keys() & other.keys())
    )


class Connections:
    """Connections that are kept and used again, as many as are needed at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        lines = [f"POST {path} HTTP/1.1", "host: worker", "content-type: application/json"]
        lines.append(f"content-length: {len(body)}")
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        header = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in header.decode().lower().split("\r\n")[1:] if line)
        content = await reader.readexactly(int(fields["content-length"]))
        self._idle.append((reader, writer))
        return int(header.split(b" ", 2)[1]), content


@dataclass(frozen=True)
class Asked:
    """What is asked for: so many candidates to be ranked, of so many items; 0: ten items to be recommended."""

    users: int
    candidates: int = 0
    items: int = 0

    def request(self, rng: random.Random) -> tuple[int, str, bytes]:
        """A user, path and body."""
        user = rng.randrange(self.users)
        if not self.candidates:
            return user, "/v1/recommend", json.dumps({"user_id": user, "k": 10}).encode()
        candidates = rng.sample(range(self.items), self.candidates)
        return user, "/v1/rank", json.dumps({"user_id": user, "candidates": candidates}).encode()


async def load(port: int, rate: float, seconds: float, asked: Asked, seed: int) -> Seen:
    """Ask for `seconds`, and wait for the last answers."""
    seen, connections, rng = Seen(), Connections(port), random.Random(seed)

    async def ask(user: int, path: str, body: bytes, due_s: float) -> None:
        try:
            status, content = await asyncio.wait_for(connections.post(path, body), 30)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            seen.outcomes[type(error).__name__] += 1
            return
        seen.answered(user, due_s, status, content)

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            due_s = started_s + number / rate
            if (wait_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            group.create_task(ask(*asked.request(rng), due_s))
    return seen


def summary(seen: Seen) -> dict[str, Any]:
    """JSON-ready."""
    latency_ms = sorted(seen.latency_ms)
    return {
        "requests": sum(seen.outcomes.values()),
        "outcomes": dict(seen.outcomes),
        "compared": seen.num_compared,
        "mixed": seen.num_mixed,
        "with_vector": seen.num_with_vector,
        "versions": len({version for _, version in seen.answers}),
        "latency_ms": [round(ms, 3) for ms in latency_ms],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="load on an inference worker")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--users", type=int, default=500, help="user ids 0 to this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--candidates", type=int, default=0, help="to be ranked, instead of recommending")
    parser.add_argument("--items", type=int, default=20_000, help="item ids 0 to this are candidates")
    args = parser.parse_args()
    asked = Asked(args.users, args.candidates, args.items)
    print(json.dumps(summary(asyncio.run(load(args.port, args.rate, args.seconds, asked, args.seed)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
