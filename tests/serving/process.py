"""A worker as a process of its own, for tests that signal it: `python -m tests.serving.process FOLDER BROKER JSON`."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from serving.access_config import AccessConfig
from serving.config import ServingConfig
from serving.daemon import run_worker
from serving.parts import ServingParts
from stream.clock import WallClock
from stream.events import EventRules
from stream.kafka import KafkaConfig, KafkaLog
from tests.serving.building import HOT, MODEL, NAME

ROOT = Path(__file__).parents[2]


def main(folder: str, bootstrap_servers: str, settings: str) -> int:
    """Serve what a test has put into `folder`, on a free port that the log names.

    settings: JSON, fields of ServingConfig under "serving" and of AccessConfig under "access".
    """
    given = json.loads(settings)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    return run_worker(
        ServingParts(
            config=ServingConfig(**{"port": 0, "snapshot_poll_ms": 20, **given.get("serving", {})}),
            access=AccessConfig(**given.get("access", {})),
            model_config=MODEL,
            model_name=NAME,
            snapshot_root=Path(folder) / "snapshots",
            log=KafkaLog(KafkaConfig(bootstrap_servers=bootstrap_servers)),
            store=FeatureStore(FeatureStoreConfig(url=f"sqlite:///{Path(folder) / 'store.db'}")),
            hot_config=HOT,
            rules=EventRules(),
            clock=WallClock(),
            replica="process",
        )
    )


@asynccontextmanager
async def process(
    folder: Path, bootstrap_servers: str, **settings: dict[str, Any]
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A running worker process and its URL; killed if the test leaves it behind."""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-m", "tests.serving.process"),
        *(str(folder), bootstrap_servers, json.dumps(settings)),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
        # Read on while nobody asks: a worker with much to say would else wait in the middle of an answer.
        limit=1 << 30,
    )
    assert running.stderr is not None
    try:
        async for line in running.stderr:
            if found := re.search(rb"serving on (https?://\S+)", line):
                yield running, found[1].decode()
                return
        pytest.fail("the process ended before it served")
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


async def stderr_of(running: asyncio.subprocess.Process) -> str:
    assert running.stderr is not None
    return (await running.stderr.read()).decode()


async def until_ready(client: httpx.AsyncClient) -> None:
    deadline_s = time.monotonic() + 120
    while (await client.get("/readyz")).status_code != 200:
        assert time.monotonic() < deadline_s, (await client.get("/readyz")).text
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
